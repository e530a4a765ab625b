"""Keys and values of what was read, with room for what is yet to be written."""

import functools

import torch

ROOM = 64  # tokens that a layer has room for before its keys and values are copied to a larger place


@functools.cache
def _roomy_layer() -> type:
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """transformers' layer that grows, but without copying everything for each token: `keys` and `values` (B, G, T, D) are
        views of tensors (B, G, T + room, D), into which new tokens are written."""

        def __init__(self, layer: DynamicLayer):
            super().__init__()
            self.lazy_initialization(layer.keys, layer.values)
            self.keys, self.values = layer.keys, layer.values
            self.held = {"keys": layer.keys, "values": layer.values}

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
            self.keys, self.values = self._appended("keys", key_states), self._appended("values", value_states)
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            self.held = {"keys": self.keys, "values": self.values}

        def _appended(self, name: str, new: torch.Tensor) -> torch.Tensor:
            seen, held = getattr(self, name), self.held[name]
            start, stop = seen.shape[2], seen.shape[2] + new.shape[2]
            if stop > held.shape[2]:
                held = self.held[name] = new.new_empty(*new.shape[:2], stop + ROOM, new.shape[3])
                held[:, :, :start] = seen
            held[:, :, start:stop] = new
            return held[:, :, :stop]

    return RoomyLayer


def with_room(cache):
    """The cache of a model that has read its prompts, ready to grow. Only layers of the plain kind are changed: those with a
    window, or with states of another kind, keep their own ways."""
    from transformers.cache_utils import DynamicLayer

    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers[i] = _roomy_layer()(layer)
    return cache
