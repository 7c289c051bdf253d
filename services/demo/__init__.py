"""`hotswap demo`: three small models made on the spot, and the main job measured with them."""
