from app.keys.tenant import Tenant


def test_nobody_gets_ahead_of_their_key():
    tenant = Tenant("a", priority=2)
    assert [tenant.priority_of(requested) for requested in (None, 0, 2, 5)] == [2, 2, 2, 5]


def test_no_tenant_can_spell_the_salt_of_another():
    salted, plain = Tenant("a", cache_salt="x"), Tenant("b")
    assert plain.salted("") == ""
    assert salted.salted("y") == "1:xy"
    assert plain.salted("1:xy") != salted.salted("y")
    assert Tenant("c", cache_salt="xy").salted("") != salted.salted("y")
