"""The part of a training framework's config that a layout decides: DeepSpeed's JSON, torchtitan's TOML.

Sources of the keys: DeepSpeed's documentation (configuration JSON, AutoTP for training) and runtime/zero/
offload_config.py; torchtitan 0.2, config/job_config.py and distributed/pipeline_parallel.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from headrace.core.errors import InvalidParameter
from headrace.plan.offload import Block, Policy
from headrace.plan.training import Layout

NVME_PATH = "/local_nvme"
BUFFER_NUMBERS = 10**8
"""Least that DeepSpeed's buffers for parameters from NVMe hold."""
PRECISIONS: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16"}
"""Type of arithmetic -> its name in DeepSpeed."""
Settings = Mapping[str, object]


def deepspeed_training(layout: Layout, dtype: str = "bfloat16") -> dict[str, object]:
    """`dtype`: of PRECISIONS. Raises InvalidParameter for what DeepSpeed's config cannot say."""
    if layout.pp > 1 and layout.zero > 1:
        raise InvalidParameter("zero", layout.zero, "0 or 1 with pp > 1: DeepSpeed's pipeline keeps gradients whole")
    if layout.interleave > 1:
        raise InvalidParameter("interleave", layout.interleave, "1: DeepSpeed's pipeline has one piece a stage")
    zero: dict[str, object] = {"stage": layout.zero}
    if layout.zero:
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    if layout.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if layout.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, object] = {
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.micro_batches,
        PRECISIONS[dtype]: {"enabled": True},
        "zero_optimization": zero,
    }
    if layout.tp > 1 and layout.pp == 1:
        config["tensor_parallel"] = {"autotp_size": layout.tp}
    if layout.recompute == "full":
        config["activation_checkpointing"] = {"partition_activations": layout.tp > 1 and layout.sequence_parallel}
    return config


def deepspeed_notes(layout: Layout) -> list[str]:
    """What of the layout is said in code."""
    notes = []
    if layout.tp > 1 and layout.pp > 1:
        notes.append(f"DeepSpeed: beside a pipeline, TP {layout.tp} is the model's own code (Megatron-DeepSpeed).")
    if layout.tp > 1 and layout.zero == 3:
        notes.append("DeepSpeed: ZeRO-3 beside AutoTP needs version 0.19.4 or later; earlier ones take stages 0 to 2.")
    if layout.tp > 1 and layout.pp == 1 and layout.sequence_parallel:
        notes.append("DeepSpeed: AutoTP has no sequence parallelism; activations are larger than planned.")
    if layout.pp > 1:
        notes.append(f"DeepSpeed: the pipeline is built in code, PipelineModule(num_stages={layout.pp}).")
    if layout.recompute != "none":
        notes.append("DeepSpeed: recomputation is asked for in the model's code (deepspeed.checkpointing.checkpoint).")
    return notes


def torchtitan(layout: Layout, layers: int, dtype: str = "bfloat16") -> dict[str, Settings]:
    """Tables of keys. FSDP shards all states: with parameters kept after forward it is ZeRO-2, else ZeRO-3. `layers`:
    of the model.

    Raises InvalidParameter for what torchtitan does not have.
    """
    if dtype != "bfloat16":
        raise InvalidParameter("device", dtype, "one with bfloat16: torchtitan has no other 16-bit type")
    if layout.zero == 1:
        raise InvalidParameter("zero", 1, "0 (replicas), 2 or 3 (FSDP) in torchtitan")
    if layout.zero == 0 and layout.dp > 1 and layout.tp * layout.pp > 1:
        raise InvalidParameter("zero", 0, "2 or 3 with tp or pp > 1: torchtitan's replicas go with neither")
    if layout.recompute == "selective":
        raise InvalidParameter("recompute", layout.recompute, "none or full: torchtitan's selective is another one")
    if layout.offload == "optimizer":
        raise InvalidParameter("offload", layout.offload, "none or all in torchtitan")
    if layout.tp > 1 and not layout.sequence_parallel:
        raise InvalidParameter("sequence_parallel", False, "on: torchtitan's tensor parallelism always has it")
    training: dict[str, object] = {
        "local_batch_size": layout.micro_batch * (layout.micro_batches if layout.pp > 1 else 1),
        "global_batch_size": layout.global_batch,
        "seq_len": layout.sequence,
        "mixed_precision_param": "bfloat16",
        "mixed_precision_reduce": "float32",
        "enable_cpu_offload": layout.offload == "all",
    }
    sharded = layout.zero > 0
    parallelism: dict[str, object] = {
        "data_parallel_replicate_degree": 1 if sharded else layout.dp,
        "data_parallel_shard_degree": layout.dp if sharded else 1,
        "fsdp_reshard_after_forward": "always" if layout.zero == 3 else "never",
        "tensor_parallel_degree": layout.tp,
        "pipeline_parallel_degree": layout.pp,
    }
    if layout.pp > 1:
        # Its own choice gives the first and the last stage a layer less, and two pieces to interleave.
        parallelism |= {
            "pipeline_parallel_schedule": "Interleaved1F1B" if layout.interleave > 1 else "1F1B",
            "pipeline_parallel_microbatch_size": layout.micro_batch,
            "pipeline_parallel_layers_per_stage": math.ceil(layers / (layout.pp * layout.interleave)),
            "pipeline_parallel_first_stage_less_layers": 0,
            "pipeline_parallel_last_stage_less_layers": 0,
        }
    return {
        "training": training,
        "parallelism": parallelism,
        "activation_checkpoint": {"mode": layout.recompute},
    }


def deepspeed_inference(
    block: Block, policy: Policy, parameters: int, largest: int, dtype: str = "bfloat16"
) -> dict[str, object]:
    """ZeRO-Inference: weights come from the host, or from NVMe where the policy has some on disk. `largest`: numbers of
    the largest tensor; `dtype`: of PRECISIONS."""
    _, host, disk = policy.weights
    param: dict[str, object] = {"device": "nvme" if disk else "cpu", "pin_memory": True}
    if disk:
        param |= {
            "nvme_path": NVME_PATH,
            "buffer_count": 5,
            "buffer_size": max(BUFFER_NUMBERS, largest),
            "max_in_cpu": round(parameters * host),
        }
    return {
        "train_micro_batch_size_per_gpu": block.sequences,
        PRECISIONS[dtype]: {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_param": param} if host + disk else {"stage": 0},
    }


def inference_notes(policy: Policy) -> list[str]:
    """Where ZeRO-Inference does otherwise than the policy."""
    notes = []
    if 0 < policy.weights[0] < 1:
        notes.append(
            f"ZeRO-Inference streams all weights: the {100 * policy.weights[0]:.0f} % that the placement keeps on the "
            "device are not kept by this config."
        )
    if policy.cache[0] < 1:
        notes.append(
            "ZeRO-Inference keeps the KV cache on the device unless the model's code offloads it: with this config "
            "fewer sequences may fit."
        )
    return notes


# ---------------------------------------------------------------- text


def json_text(config: Settings) -> str:
    return json.dumps(config, indent=2) + "\n"


def toml_text(tables: Mapping[str, Settings]) -> str:
    """Of tables of flags, numbers and plain text."""
    parts = []
    for name, settings in tables.items():
        # A JSON string, number or flag is written the same in TOML.
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        parts.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(parts) + "\n"
