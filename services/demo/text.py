"""Plain English for the demo tokenizer to be trained on and for prompts to be made of."""

from typing import Final

ENGLISH: Final = """\
The sun is up and the day is new. A small boat goes down the river to the sea.
Hello, how are you today? I am fine, thank you. What is your name? My name is Anna.
Write a short poem about the rain. Tell me a story about a dog and a cat.
What is the capital of France? The capital of France is Paris. Please answer in one word.
You are a helpful assistant. Answer the question in a few words, and say so if you do not know.
Explain how a computer works, step by step, to a child of ten years.
Memory is where a program keeps what it needs. When there is no room left, something must go.
A model that nobody asks for can wait in the memory of the host; a request brings it back.
How long does it take to move a gigabyte? That depends on the link, and on what else it carries.
Once upon a time there was an old king who had three daughters and one very large garden.
In the morning they walked through the forest, and in the evening they came home again.
Water boils when it is hot enough, and it turns to ice when it is cold enough.
The train leaves at nine; do not be late, because it will not wait for us.
She opened the window, looked at the street below, and smiled at the people who went by.
He reads a book every week, and he writes down the best sentence from each of them.
We need bread, milk, butter, eggs, apples, and some cheese. Could you go to the market?
Count from one to ten: one, two, three, four, five, six, seven, eight, nine, ten.
Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday: seven days make a week.
January, February, March, April, May, June, July, August, September, October, November, December.
Spring is green, summer is warm, autumn is red and brown, and winter is white and quiet.
Red, orange, yellow, green, blue, violet, black, white, grey, and pink are names of colours.
A good question is half of the answer. Read the text below, then write a summary of it.
Translate this sentence into German, French, Spanish, or Italian. Correct any mistakes you find.
Give me three reasons why people should learn another language, and one reason why they do not.
What is the difference between a list and a tuple in Python? Show a short example of each.
Write a function that takes two numbers and returns their sum; then write a test for it.
def add(a, b): return a + b
for i in range(10): print(i)
if x is None: raise ValueError("x must not be None")
import time; start = time.time(); result = run(start); print(result)
The quick brown fox jumps over the lazy dog, and the dog does not even look up.
It was a bright cold day, and all of the clocks in the town were wrong by an hour.
Every page that is free can be used by any model; every page in use has exactly one owner.
The first request is slow, the second one is fast, and nobody remembers the first one.
A queue is a promise: who comes first is served first, unless there is a good reason.
Nothing is lost when a server stops, as long as somebody wrote down what was going on.
Please check the number again, because the total at the end of the page cannot be right.
My brother lives in a house near the mountain, with his wife, two children, and a horse.
They talked about music, about work, about money, and about where they would go next year.
The teacher asked the class to be quiet, but the class had already gone out to play.
A map is not the land, and a plan is not the work, yet both of them help us to begin.
Light travels faster than sound; that is why you see the storm before you hear it.
Some birds fly south before the winter and come back north again when the snow is gone.
Plants need light, air, water, and time. Most of them ask for nothing else at all.
The city has a station, a school, a library, a hospital, two bridges, and one good bakery.
Tea or coffee? With sugar or without? Would you like something to eat with that?
If you can keep it simple, keep it simple; if you cannot, then explain why it is not.
Open the door, close the door, turn on the light, turn off the light, sit down, stand up.
I think, I know, I see, I want, I need, I like, I can, I will, I would, I should, I must.
this that these those here there now then always never often again once more less most least
who what where when why how which whose many much some any every each all none other another
time year day week month hour minute second moment morning noon evening night today tomorrow
man woman child boy girl friend family mother father sister brother people person group world
hand head eye ear face arm leg foot heart mind body voice word name story idea thought reason
house room door window wall floor table chair bed kitchen garden street road bridge city country
water fire earth air stone tree leaf flower grass river lake sea island mountain sky star moon
dog cat horse cow sheep bird fish mouse bear wolf lion tiger snake frog bee ant spider worm
go come see look make take give get put keep let begin start stop run walk stand sit turn move
say tell ask answer speak talk call write read hear listen think know learn teach show find lose
big small long short high low wide narrow old young new good bad right wrong true false easy hard
first second third last next same different open closed full empty hot cold warm dry wet clean
number part place point line side end top bottom middle left right front back inside outside
system memory device host server client request answer token prompt model layer weight cache page
"""
