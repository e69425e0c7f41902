"""The state tree as JSON: every kind of value, and what is refused."""

import json
import struct

import pytest
from snapd_proto import format_pb2

from snapd.export.tree_json import TreeContext, TreeError, skeleton_to_json, tree_to_json

Value, Sequence, Mapping = format_pb2.Value, format_pb2.Sequence, format_pb2.Mapping


def _text(text: str) -> format_pb2.Value:
    return Value(text=text)


def _list(*items: format_pb2.Value) -> format_pb2.Value:
    return Value(sequence=Sequence(type=Sequence.LIST, items=items))


def _tuple(*items: format_pb2.Value) -> format_pb2.Value:
    return Value(sequence=Sequence(type=Sequence.TUPLE, items=items))


def _dict(*pairs: tuple[format_pb2.Value, format_pb2.Value]) -> format_pb2.Value:
    keys, values = zip(*pairs, strict=True) if pairs else ((), ())
    return Value(mapping=Mapping(type=Mapping.DICT, keys=keys, values=values))


def _convert(value: format_pb2.Value, scalars: list[format_pb2.Value] | None = None) -> object:
    context = TreeContext(tensor_names=["w", "b"], parameter_names=["layer.w"], scalars=scalars or [])
    found = tree_to_json(value, context)
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Value(none=format_pb2.Unit()), None),
        (Value(boolean=True), True),
        (Value(integer=-(2**63)), -(2**63)),
        (Value(big_integer=(2**80 - 3).to_bytes(11, "little", signed=True)), 2**80 - 3),
        (Value(big_integer=(-(2**70)).to_bytes(9, "little", signed=True)), -(2**70)),
        (Value(real=0.1), 0.1),
        (Value(real=float("inf")), {"$type": "float", "value": "inf", "bits": "7ff0000000000000"}),
        (Value(text="ä"), "ä"),
        (Value(raw=b"\x00\xff"), {"$type": "bytes", "base64": "AP8="}),
        (Value(tensor=1), {"$tensor": "b"}),
        (Value(parameter=0), {"$parameter": "layer.w"}),
        (
            Value(named=format_pb2.Named(type_name="torch:dtype", text="float32")),
            {"$type": "named", "class": "torch:dtype", "text": "float32"},
        ),
        (
            Value(complex=format_pb2.Complex(re=1.0, im=-2.0)),
            {"$type": "complex", "re": 1.0, "im": -2.0},
        ),
    ],
)
def test_leaves(value: format_pb2.Value, expected: object) -> None:
    assert _convert(value) == expected


def test_nan_keeps_its_payload() -> None:
    (nan,) = struct.unpack(">d", bytes.fromhex("7ff8000000000123"))
    assert _convert(Value(real=nan)) == {"$type": "float", "value": "nan", "bits": "7ff8000000000123"}


def test_a_real_that_is_whole_stays_a_real() -> None:
    assert isinstance(_convert(Value(real=2.0)), float)
    assert isinstance(_convert(Value(integer=2)), int)


def test_plain_containers_stay_plain() -> None:
    value = _dict((_text("lr"), Value(real=0.5)), (_text("betas"), _list(Value(integer=1), Value(integer=2))))
    assert _convert(value) == {"lr": 0.5, "betas": [1, 2]}


def test_dictionaries_with_other_keys_keep_their_types() -> None:
    value = _dict((Value(integer=1), _text("a")), (Value(boolean=True), _text("b")))
    assert _convert(value) == {"$type": "dict", "items": [[1, "a"], [True, "b"]]}
    assert _convert(_dict((_text("$type"), _text("x")))) == {"$type": "dict", "items": [["$type", "x"]]}


def test_ordered_and_default_dictionaries_are_named() -> None:
    ordered = Value(mapping=Mapping(type=Mapping.ORDERED_DICT, keys=[_text("a")], values=[Value(integer=1)]))
    assert _convert(ordered) == {"$type": "ordered_dict", "items": [["a", 1]]}
    default = Value(mapping=Mapping(type=Mapping.DEFAULT_DICT, default_factory="builtins:list"))
    assert _convert(default) == {"$type": "default_dict", "factory": "builtins:list", "items": []}


def test_sequences_that_are_not_lists_are_named() -> None:
    deque = Value(sequence=Sequence(type=Sequence.DEQUE, items=[Value(integer=1)], deque_maxlen=4))
    assert _convert(deque) == {"$type": "deque", "maxlen": 4, "items": [1]}
    unbounded = Value(sequence=Sequence(type=Sequence.DEQUE, deque_maxlen=-1))
    assert _convert(unbounded) == {"$type": "deque", "maxlen": None, "items": []}
    named = Value(sequence=Sequence(type=Sequence.TUPLE, items=[Value(integer=1)], type_name="m:Point"))
    assert _convert(named) == {"$type": "tuple", "class": "m:Point", "items": [1]}


def test_scalars_are_put_in_place() -> None:
    assert _convert(_list(Value(scalar=1), Value(scalar=0)), [Value(integer=7), _text("x")]) == ["x", 7]


def test_objects_show_class_and_fields() -> None:
    value = Value(
        opaque=format_pb2.Opaque(type_name="m:C", how="fields", fields=_dict((_text("n"), Value(integer=3))))
    )
    assert _convert(value) == {"$type": "object", "class": "m:C", "how": "fields", "fields": {"n": 3}}


def test_an_alias_points_at_the_container_by_its_number() -> None:
    shared = _list(Value(integer=5))
    value = _dict((_text("a"), shared), (_text("b"), Value(alias=1)))
    assert _convert(value) == {"a": {"$type": "list", "$id": 1, "items": [5]}, "b": {"$same_as": 1}}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Value(tensor=2), "tensor 2, but there are 2"),
        (Value(parameter=1), "parameter 1"),
        (Value(scalar=0), "scalar 0"),
        (Value(), "unknown kind"),
        (Value(mapping=Mapping(type=Mapping.DICT, keys=[Value(integer=1)])), "1 keys and 0 values"),
    ],
)
def test_what_points_nowhere_is_refused(value: format_pb2.Value, text: str) -> None:
    with pytest.raises(TreeError, match=text):
        _convert(value)


def test_a_scalar_that_names_itself_is_refused() -> None:
    with pytest.raises(TreeError, match="scalar 0 stands for another"):
        _convert(Value(scalar=0), [Value(scalar=0)])


def test_numbers_skip_keys_and_the_inside_of_scalars() -> None:
    """As the client counts: 0 the root, 1 the scalar's list, 2 the last list; keys and insides apart."""
    key = _tuple(_list(Value(integer=9)), Value(integer=1))
    scalar = _list(_list(Value(integer=1)), Value(alias=1))
    value = _dict(
        (key, Value(scalar=0)),
        (_text("b"), _list(Value(integer=7))),
        (_text("again"), Value(alias=1)),
        (_text("b again"), Value(alias=2)),
    )
    found = _convert(value, [scalar])
    inner = {"$type": "list", "$id": "scalar-0.1", "items": [1]}
    assert found == {
        "$type": "dict",
        "items": [
            [
                {"$type": "tuple", "items": [[9], 1]},
                {"$type": "list", "$id": 1, "items": [inner, {"$same_as": "scalar-0.1"}]},
            ],
            ["b", {"$type": "list", "$id": 2, "items": [7]}],
            ["again", {"$same_as": 1}],
            ["b again", {"$same_as": 2}],
        ],
    }


def test_objects_and_their_fields_are_counted_both() -> None:
    opaque = Value(opaque=format_pb2.Opaque(type_name="m:C", how="fields", fields=_dict()))
    found = _convert(_list(opaque, _list(), Value(alias=3), Value(alias=1)))
    assert found == [
        {"$type": "object", "$id": 1, "class": "m:C", "how": "fields", "fields": {}},
        {"$type": "list", "$id": 3, "items": []},
        {"$same_as": 3},
        {"$same_as": 1},
    ]


def test_in_a_skeleton_the_parts_of_modules_and_optimizers_have_no_numbers() -> None:
    """As the client counts: 0 state, 1 module, 2 optimizer, 3 its groups, 4 its state, 5 loader, 6 and 7 the list."""

    def part(how: str, *pairs: tuple[str, format_pb2.Value]) -> format_pb2.Value:
        fields = _dict(*((_text(name), value) for name, value in pairs))
        return Value(opaque=format_pb2.Opaque(type_name="m:C", how=how, fields=fields))

    module = part("module", ("weight", Value(tensor=0)), ("_extra_state", Value(scalar=0)))
    optimizer = part(
        "optimizer",
        ("parameters", _dict()),
        ("param_groups", _list()),
        ("state", _dict()),
        ("attributes", _dict()),
    )
    loader = Value(opaque=format_pb2.Opaque(type_name="m:L", how="loader", fields=Value(scalar=0)))
    state = _dict(
        (_text("module"), module),
        (_text("optimizer"), optimizer),
        (_text("loader"), loader),
        (_text("list"), _list(_list(Value(integer=1)))),
        (_text("again"), Value(alias=7)),
        (_text("groups"), Value(alias=3)),
    )
    root = _dict((_text("state"), state), (_text("rng"), Value(scalar=0)))
    context = TreeContext(tensor_names=["w"], parameter_names=[], scalars=[_list(Value(integer=9))])
    found = skeleton_to_json(root, context)
    assert isinstance(found, dict) and isinstance(found["state"], dict)
    assert found["rng"] == [9]
    assert found["state"]["list"] == [{"$type": "list", "$id": 7, "items": [1]}]
    assert found["state"]["again"] == {"$same_as": 7}
    groups = {"$type": "list", "$id": 3, "items": []}
    assert found["state"]["optimizer"]["fields"]["param_groups"] == groups
    assert found["state"]["groups"] == {"$same_as": 3}
