"""The JSON beside a rank's safetensors file: everything of the shard that is not tensor bytes. Pure."""

from snapd_proto import format_pb2

from snapd.export.contents import Contents, StoredTensor
from snapd.export.shard_view import ShardView, is_part
from snapd.export.tree_json import Json, TreeContext, skeleton_to_json, tree_to_json

EXPORT_FORMAT = "snapd-export"
EXPORT_VERSION = 1
_NO_OPTIMIZER = 0xFFFFFFFF


def rank_json(view: ShardView, contents: Contents, tensors_file: str) -> dict[str, Json]:
    """What `rank-NNNNN.json` holds.

    Raises:
        TreeError: the state tree points outside the layout.
    """
    record, layout = view.record, view.layout
    tensor_names = [contents.names.get(number, tensor.name) for number, tensor in enumerate(layout.tensors)]
    parameter_names = [parameter.name for parameter in layout.parameters]
    context = TreeContext(
        tensor_names=tensor_names, parameter_names=parameter_names, scalars=view.early.scalars
    )
    return {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "job": record.job,
        "generation": record.generation,
        "step": record.step,
        "parent": parent_json(record),
        "rank": record.rank,
        "world_size": record.world_size,
        "captured_wall_time_s": record.captured_wall_time_s,
        "client_version": layout.client_version,
        "torch_version": layout.torch_version,
        "shard_xxh3_128": record.shard_xxh3_128.hex(),
        "tensors_file": tensors_file,
        "tree": skeleton_to_json(layout.skeleton, context),
        "parameters": [_parameter_json(parameter) for parameter in layout.parameters],
        "tensors": _tensors_json(layout, contents, context),
        "aliases": {**contents.aliases},
        "overlapping": [[*group] for group in contents.overlapping],
    }


def parent_json(record: format_pb2.ShardRecord) -> Json:
    """The snapshot that this generation was restored from, or None."""
    if not record.has_parent:
        return None
    return {"generation": record.parent_generation, "step": record.parent_step}


def _parameter_json(parameter: format_pb2.ParameterName) -> Json:
    if parameter.optimizer == _NO_OPTIMIZER:
        return {"name": parameter.name, "optimizer": None}
    return {
        "name": parameter.name,
        "optimizer": parameter.optimizer,
        "group": parameter.group,
        "index": parameter.index,
    }


def _tensors_json(
    layout: format_pb2.ShardLayout, contents: Contents, context: TreeContext
) -> dict[str, Json]:
    components = {part.tensor for tensor in layout.tensors for part in tensor.subclass.components}
    stored = {tensor.name: tensor for tensor in contents.stored}
    return {
        tensor.name: _tensor_json(layout, number, contents, stored, context)
        for number, tensor in enumerate(layout.tensors)
        if number not in components
    }


def _tensor_json(
    layout: format_pb2.ShardLayout,
    number: int,
    contents: Contents,
    stored: dict[str, StoredTensor],
    context: TreeContext,
) -> Json:
    """One tensor; the components of a wrapper are nested in it."""
    tensor = layout.tensors[number]
    result: dict[str, Json] = {"dtype": tensor.dtype, "shape": [*tensor.shape], "strides": [*tensor.strides]}
    if tensor.live_strides:  # the trainer's; it is stored without its holes
        result["live_strides"] = [*tensor.live_strides]
    result.update(_box_json(tensor))
    for flag in ("requires_grad", "is_parameter", "is_frozen"):
        if getattr(tensor, flag):
            result[flag] = True
    for text in ("device", "role", "field", "parameter_name"):
        if getattr(tensor, text):
            result[text] = getattr(tensor, text)
    if tensor.replica_set.ranks:
        result["replica_ranks"] = [*tensor.replica_set.ranks]
    if number in contents.names:
        name = contents.names[number]
        result["stored"] = _stored_json(stored[contents.aliases.get(name, name)])
    if tensor.HasField("distributed"):
        result["distributed"] = _distributed_json(tensor.distributed)
    if tensor.HasField("subclass"):
        result["components"] = {
            part.attribute: _tensor_json(layout, part.tensor, contents, stored, context)
            for part in tensor.subclass.components
        }
        if tensor.subclass.type_name:
            result["class"] = tensor.subclass.type_name
        if tensor.subclass.HasField("context"):
            result["context"] = tree_to_json(tensor.subclass.context, context)
    return result


def _box_json(tensor: format_pb2.Tensor) -> dict[str, Json]:
    """Global shape and offset, where the tensor is part of a larger one."""
    if not tensor.global_shape or not (tensor.HasField("distributed") or is_part(tensor)):
        return {}
    return {"global_shape": [*tensor.global_shape], "local_offset": [*tensor.local_offset]}


def _stored_json(tensor: StoredTensor) -> Json:
    form = tensor.stored_type
    return {"name": tensor.name, "dtype": form.name, "shape": [*form.stored_shape(tensor.shape)]}


def _distributed_json(distributed: format_pb2.Distributed) -> Json:
    return {
        "mesh_shape": [*distributed.mesh_shape],
        "mesh_dim_names": [*distributed.mesh_dim_names],
        "placements": [*distributed.placements],
        "mesh_coordinate": [*distributed.mesh_coordinate],
        "mesh_ranks": [*distributed.mesh_ranks],
    }
