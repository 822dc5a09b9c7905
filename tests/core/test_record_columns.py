import pytest

from neo.core.record import RunRecord, StepColumns


def test_an_attempt_that_ends_half_way_leaves_no_row_twice() -> None:
    """A signal may come while rows become columns; whoever writes partial results asks for them again."""
    names = list(StepColumns.__dataclass_fields__)
    record = RunRecord()
    record.add_row((1.0, 2.0, *[3] * (len(names) - 2)))
    assert list(record.columns.end_s) == [2.0]
    row = (4.0, 5.0, *[6] * (len(names) - 2))
    record.add_row(row)
    record.add_row((*row[:-1], "here"))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _ = record.columns
    record._rows[-1] = row
    for name in names:
        assert len(getattr(record.columns, name)) == 3, name
    assert list(record.columns.end_s) == [2.0, 5.0, 5.0]
