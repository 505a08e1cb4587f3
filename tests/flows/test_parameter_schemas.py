"""The schema of a deployment's parameters is checked once, and its parameters each time."""

import pytest
from prefect.utilities.schema_tools import validation

from flows import parameter_schemas

SCHEMA = {"type": "object", "properties": {"steps": {"type": "integer"}}, "required": ["steps"]}


@pytest.fixture
def checked(monkeypatch):
    """The schemas that were really checked."""
    found, check = [], validation._VALIDATOR.check_schema

    def note(schema, *arguments, **options):
        found.append(schema)
        check(schema, *arguments, **options)

    monkeypatch.setattr(validation._VALIDATOR, "check_schema", staticmethod(note))
    parameter_schemas.check_each_once()
    return found


def test_a_schema_is_checked_once_and_every_run_against_it(checked):
    for steps in range(3):
        validation.validate({"steps": steps}, SCHEMA, raise_on_error=True)
    assert len(checked) == 1
    with pytest.raises(validation.ValidationError, match="'three' is not of type"):
        validation.validate({"steps": "three"}, SCHEMA, raise_on_error=True)
    other = {**SCHEMA, "properties": {"steps": {"type": "string"}}}
    validation.validate({"steps": "three"}, other, raise_on_error=True)
    assert len(checked) == 2


def test_a_wrong_schema_is_refused_each_time(checked):
    for _ in range(2):
        with pytest.raises(ValueError, match="Invalid schema"):
            validation.is_valid_schema({"type": "numbr"})
    assert len(checked) == 2
