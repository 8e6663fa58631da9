"""The public names of the package."""

import importlib
import inspect
import typing

import pytest

import recray


def test_dir_lists_exactly_the_public_names() -> None:
    assert dir(recray) == sorted([*recray.__all__, "__version__"])
    assert recray.__all__ == sorted(recray.__all__)


@pytest.mark.parametrize("name", recray.__all__)
def test_a_public_name_can_be_used_and_teaches(name: str) -> None:
    found = getattr(recray, name)
    assert getattr(importlib.import_module(found.__module__), name) is found
    assert len(found.__doc__ or "") > 20


@pytest.mark.parametrize("name", [n for n in recray.__all__ if n.islower()])
def test_functions_are_typed_without_any(name: str) -> None:
    function = getattr(recray, name)
    hints = inspect.get_annotations(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}
    assert "Any" not in str(hints.get("return"))
    assert typing.Any not in hints.values()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        recray.trian  # type: ignore[attr-defined]  # noqa: B018
