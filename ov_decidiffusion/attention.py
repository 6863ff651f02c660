"""Cut out of a U-Net's graph what its cross-attention looks at."""

import math

import numpy as np
import openvino as ov
from openvino import opset13 as ops


def cross_attention_model(model: ov.Model) -> ov.Model:
    """A U-Net that gives, in place of its prediction, what each layer of cross-attention looks at [b, h * w, tokens].

    The mean over the layer's heads. ``model`` is used up.

    Raises:
        ValueError: the model has no such layers.
    """
    results = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or ".attn2/" not in node.get_friendly_name():
            continue
        query, key = node.input_value(0), node.input_value(1)
        scale = np.float32(1 / math.sqrt(query.get_partial_shape()[3].get_length()))
        scores = ops.multiply(ops.matmul(query, key, transpose_a=False, transpose_b=True), scale)
        results.append(ops.result(ops.reduce_mean(ops.softmax(scores, axis=3), np.int64([1]), keep_dims=False)))
    if not results:
        raise ValueError("This U-Net has no layers of cross-attention that convert_checkpoint wrote.")
    return ov.Model(results, model.get_parameters(), "unet_attention")
