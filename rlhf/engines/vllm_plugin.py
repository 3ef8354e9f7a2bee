"""The engine's end of the connection, as vLLM's plugin; it runs in vLLM's workers.

    vllm serve MODEL --weight-transfer-config '{"backend": "instructflow"}' ...

`pip install --no-deps instructflow` in vLLM's environment is enough: vLLM finds `register` by its entry point. Written
for the weight transfer of vLLM 0.32.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf.engines.expected import tensors_of
from rlhf.engines.transfer import BACKEND, Receiver


def register() -> None:
    """Makes the backend known to vLLM; called in each of its processes, sometimes twice."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, Transfer)


@dataclass
class Info(WeightTransferInitInfo, WeightTransferUpdateInfo):
    """What a request says, unread: the other end knows its form."""

    content: dict[str, Any] = field(default_factory=dict)


class Transfer(WeightTransferEngine[Info, Info]):
    """Whole tensors under their Hugging Face names, which vLLM's own loader takes apart for each worker."""

    init_info_cls = update_info_cls = Info
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        facts = {"dtype": str(self.model_config.dtype).removeprefix("torch."),
                 "tied": bool(self.model_config.hf_config.tie_word_embeddings)}
        self.receiver = Receiver(tensors_of(self.model_config.hf_config.to_json_string(use_diff=False)), facts, device)
        self.updating = False

    def parse_init_info(self, init_dict: dict[str, Any]) -> Info:
        return Info(init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Info:
        return Info(update_dict)

    def init_transfer_engine(self, init_info: Info) -> None:
        parallel = self.parallel_config
        self.receiver.join(init_info.content, parallel.data_parallel_index * parallel.world_size + parallel.rank)

    def start_weight_update(self) -> None:
        if self.updating:  # of a trainer that is gone: what it had sent is not mixed with what comes now
            self.finish_weight_update()
        initialize_layerwise_reload(self.model)
        self.updating = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Info) -> None:
        self.receiver.receive(update_info.content, lambda name, value: self.model.load_weights([(name, value)]))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self.updating = False

    def shutdown(self) -> None:
        self.receiver.leave()
