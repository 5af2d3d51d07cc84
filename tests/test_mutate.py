"""The script that mutates modules changes one thing at a time."""

from mutate import mutate

SOURCE = """a = b + c * 2
if a < b and c:
    d = -a if c else b
    e = a - 1"""
CHANGED = [
    ("b + c * 2", "b - c * 2"),
    ("c * 2", "(c + 2)"),
    ("c * 2", "c * 3"),
    ("a < b and c", "a < b or c"),
    ("a < b", "a <= b"),
    ("-a if c else b", "-a"),
    ("-a if c else b", "b"),
    ("-a", "a"),
    ("a - 1", "a + 1"),
    ("a - 1", "a - 2"),
]


def _mutants(lines):
    mutants = []
    while mutant := mutate(SOURCE, len(mutants), lines):
        mutants.append(mutant)
    return mutants


def test_a_mutant_has_one_thing_changed():
    assert [source for source, _ in _mutants((1, 4))] == [SOURCE.replace(old, new) for old, new in CHANGED]


def test_lines_choose_mutants():
    assert [what for _, what in _mutants((4, 4))] == ["line 4: a - 1  ->  a + 1", "line 4: 1  ->  2"]
