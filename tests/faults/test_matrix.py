"""The table of docs/reliability.md against what happens to damaged files now."""

import pytest
from tests.faults.matrix import committed, measure, verdicts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_fault_of_every_kind_of_file_is_noticed_or_harmless(tmp_path):
    cells = measure(tmp_path)
    bad = {name: row for name, row in cells.items() if not all(cell.ok for cell in row.values())}
    assert not bad
    assert verdicts(cells) == committed()
