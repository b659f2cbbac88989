"""Memory that a process keeps."""

import platform
import subprocess
import sys

import pytest

CODE = """
import numpy as np, psutil
from mitoseg_lib.memory import reuse_memory
if {reuse}:
    print(reuse_memory())
array = np.ones(2**27, np.uint8)  # more than glibc keeps by itself
before = psutil.Process().memory_info().rss
del array
print(before - psutil.Process().memory_info().rss)
"""


def given_back(reuse):
    done = subprocess.run([sys.executable, "-c", CODE.format(reuse=reuse)], check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept_instead_of_being_handed_back():
    said, kept = given_back(True)
    (handed_back,) = given_back(False)
    assert said == "True" and int(kept) < 2**24 and int(handed_back) > 2**26


def test_other_c_libraries_are_left_alone(monkeypatch):
    from mitoseg_lib import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory.reuse_memory.__wrapped__() is False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_released_memory_goes_back_to_the_system():
    code = """
import numpy as np, psutil
from mitoseg_lib.memory import release_memory, reuse_memory
reuse_memory()
arrays = [np.ones(2**26, np.uint8) for _ in range(4)]
last = np.ones(2**20, np.uint8)  # keeps the rest from being at the end of the heap
del arrays
before = psutil.Process().memory_info().rss
release_memory()
print(before - psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 3 * 2**26
