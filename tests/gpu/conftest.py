"""These tests need a GPU: where none can be used, they are not collected."""

from services.gpu_agent.device import why_no_cuda

collect_ignore_glob = ["test_*.py"] if why_no_cuda(0) else []
