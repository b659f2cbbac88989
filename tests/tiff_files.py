"""Writing TIFFs for tests, and the one form that all errors about them have."""

import pytest
import tifffile

from mitoseg_lib.stacks import StackError


def write(path, values, **options):
    tifffile.imwrite(path, values, **{"photometric": "minisblack"} | options)
    return path


def message_of(function, *arguments, **options):
    """The message of the StackError that a call must raise; its form is the same for all."""
    with pytest.raises(StackError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and ";" in text, text
    return text
