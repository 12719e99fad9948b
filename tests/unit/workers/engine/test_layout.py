from workers.engine.layout import layout_hash


def test_equal_facts_in_any_order_have_equal_hashes():
    assert layout_hash({"a": 1, "b": [1, "x"]}) == layout_hash({"b": [1, "x"], "a": 1})
    assert len(layout_hash({})) == 16


def test_every_name_and_every_value_counts():
    facts = [{"a": 1}, {"b": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, {}, {"a": 1, "b": 1}]
    assert len({layout_hash(each) for each in facts}) == len(facts)
