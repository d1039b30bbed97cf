import subprocess
import sys

import pytest

from hf_efficient.errors import unknown_name
from hf_efficient.io.lazy import LazyTable, load


def test_names_are_light_and_the_value_is_imported_on_use():
    program = (
        "import sys\n"
        "from hf_efficient.io.lazy import LazyTable\n"
        "table, module = LazyTable({'read': 'io.json:read_json'}), 'hf_efficient.io.json'\n"
        "assert 'read' in table and 'other' not in table and list(table) == ['read'] and len(table) == 1\n"
        "assert module not in sys.modules\n"
        "assert table['read'].__name__ == 'read_json' and module in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_value_is_loaded_once_and_an_object_is_given_as_it_is():
    table = LazyTable({"dumps": "io.json:read_json", "mine": len})
    assert table["dumps"] is table["dumps"] is load("io.json:read_json")
    assert table["mine"] is len and table == {"dumps": load("io.json:read_json"), "mine": len}


def test_an_entry_can_be_added_replaced_and_taken_away():
    table = LazyTable({"mine": len})
    table["mine"], table["late"] = max, "io.json:read_json"
    assert table["mine"] is max and table["late"] is load("io.json:read_json") and table.get("none") is None
    del table["mine"]
    assert list(table) == ["late"]


def test_unknown_names_and_bad_paths():
    table = LazyTable({"gone": "io.json:no_such_function", "nowhere": "io.no_such_module:x"})
    with pytest.raises(KeyError, match="gnoe"):
        table["gnoe"]
    assert "Did you mean 'gone'?" in str(unknown_name("entry", "gnoe", table))
    with pytest.raises(ImportError, match=r"'io\.json:no_such_function': hf_efficient\.io\.json has no"):
        table["gone"]
    with pytest.raises(ImportError, match="no_such_module"):
        table["nowhere"]
