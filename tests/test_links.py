"""Addresses of others are found where readers see them; whether they answer is checked by a scheduled workflow."""

import links


def test_addresses_end_where_they_end():
    text = (
        "See [this](https://zarr.dev), (https://onnx.ai). <https://a.org/b>; `https://c.org/d_(e)` or "
        "[![x](../y.svg)](https://f.org/g) and https://h.org/i."
    )
    expected = {"https://zarr.dev", "https://onnx.ai", "https://a.org/b", "https://c.org/d_(e)"}
    assert links.links_in(text) == expected | {"https://f.org/g", "https://h.org/i"}


def test_our_own_and_invented_addresses_are_left_out():
    text = "https://github.com/YOUR_ORGANISATION/x http://127.0.0.1:80 https://example.org/{name}"
    assert links.links_in(text) == set()


def test_the_course_names_addresses_of_others_with_their_files():
    found = links.all_links()
    assert "chapters/08_whole_volumes.ipynb" in found["https://zarr.dev"]
    assert len(found) > 10 and all(link.startswith(("https://", "http://")) for link in found)


def test_an_address_that_does_not_answer_is_said():
    assert links.answer("http://127.0.0.1:9/nothing").startswith("no answer")
