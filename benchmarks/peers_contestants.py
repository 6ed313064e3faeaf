"""A contestant of `peers.py`: one function per peer, run in its own process with that peer's packages.

    python peers_contestants.py FUNCTION JOB FOLDER SETTINGS

Each function trains once on the job's documents with the peer's own trainer. It saves the adapter in peft's format into
FOLDER. SETTINGS (JSON) distinguishes the contestants of one peer. All other settings keep the peer's defaults.
"""

import gc
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from peers_job import IGNORED, Channel, Clock, DeviceClock, Job, load

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run the function that the command line names, and report its peak memory and versions."""
    function, job, folder, settings = sys.argv[1], load(Path(sys.argv[2])), Path(sys.argv[3]), json.loads(sys.argv[4])
    channel = Channel()
    if function == "remint":
        os.chdir(ROOT)  # where params.yaml is
    if function == "unsloth":
        # Its import patches other libraries, so it must be imported first.
        os.environ["UNSLOTH_CPU_COMPILE"] = str(int(settings.get("compile", False)))
        import unsloth  # noqa: F401
    import torch

    on_gpu = job.device == "cuda"
    torch.manual_seed(job.seed)

    clock = DeviceClock(channel) if on_gpu else Clock(channel)
    versions = FUNCTIONS[function](job, settings, folder, clock)
    clock.close()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    channel.say("done", peak=peak, versions=versions)


def remint(job: Job, settings: dict[str, Any], folder: Path, clock: Clock) -> dict[str, str]:
    """Our own training: the loop of the stage `train`."""
    import torch

    from remint.compute import determinism
    from remint.compute.loss import SupervisedLoss
    from remint.compute.packing import document
    from remint.core.settings import Runtime
    from remint.model import loading, lora, quantization
    from remint.runner import config
    from remint.stages.train.loop import Finished, train_steps
    from remint.stages.train.plan import Batches, make_plan
    from remint.stages.train.process_group import ProcessGroup
    from remint.stages.train.settings import Train

    overrides = [f"train.{name}={value}" for name, value in {**_our_settings(job), **settings}.items()]
    composed = config.compose({"train": Train, "runtime": Runtime}, overrides)
    train = composed["train"]
    determinism.apply(composed["runtime"])
    model = loading.load_model(Path(job.base), loading.TORCH_DTYPES[job.precision], loading.device())
    quantization.quantize(model, train.quantization)
    determinism.seed_step(job.seed, "lora", 0)
    loss_of = SupervisedLoss(lora.add_lora(model, train.lora), fused=train.kernels == "fused")
    optimizer = torch.optim.AdamW(
        [p for p in loss_of.parameters() if p.requires_grad], lr=job.lr, weight_decay=0.0, fused=True
    )
    documents = [document(ids, [label != IGNORED for label in labels]) for ids, labels in job.documents]
    batches = Batches(documents, make_plan([len(d.ids) for d in documents], train, job.seed), 0)

    steps = iter(range(batches.plan.steps))

    def on_step(*_: Any) -> None:
        step = next(steps)
        sizes = [[len(documents[i].ids) for i in row] for batch in batches.plan.of_step(step) for row in batch]
        clock.end_step([batches.plan.tokens(step), batches.learned(step), len(sizes) * max(map(sum, sizes))])

    class LastStep:
        def awaits(self, step: int) -> bool:
            return step == batches.plan.steps

        def record(self, finished: Finished) -> None: ...

    optimizer.register_step_post_hook(on_step)
    _forget(job)
    clock.begin()
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train_steps(loss_of, optimizer, constant, batches, train, job.seed, LastStep(), ProcessGroup(0, 1))
    loss_of.model.save_pretrained(folder)
    return _versions("torch", "transformers", "peft", "bitsandbytes")


def _our_settings(job: Job) -> dict[str, Any]:
    """The job as settings of the section `train`."""
    return {
        "lr": job.lr,
        "weight_decay": 0.0,
        "warmup_ratio": 0.0,
        "schedule": "constant",
        "epochs": 1,
        "max_length": job.length,
        "packing": True,
        "micro_batch": job.rows,
        "accumulation": 1,
        "processes": 1,
        "precision": job.precision,
        "gradient_checkpointing": False,
        "kernels": "fused",
        "quantization.kind": "nf4",
        "quantization.dequantize": "once",
        "lora.rank": job.rank,
        "lora.alpha": job.alpha,
        "lora.dropout": job.dropout,
        "lora.targets": f"[{','.join(job.targets)}]",
    }


def trl(job: Job, settings: dict[str, Any], folder: Path, clock: Clock) -> dict[str, str]:
    """TRL's SFTTrainer. Settings: those of SFTConfig, and `nf4`, `dtype` of the base and `adapter_dtype`."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    settings = dict(settings)
    nf4, adapter_dtype = settings.pop("nf4", True), settings.pop("adapter_dtype", None)
    dtype = getattr(torch, settings.pop("dtype", job.precision))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        job.base, dtype=dtype, device_map=job.device, quantization_config=quantization if nf4 else None
    )
    arguments = SFTConfig(
        **{"max_length": job.length, "completion_only_loss": True, **_arguments(job, folder, settings), **settings}
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=_for_trl(job),
        processing_class=AutoTokenizer.from_pretrained(job.base),
        peft_config=LoraConfig(
            r=job.rank,
            lora_alpha=job.alpha,
            lora_dropout=job.dropout,
            target_modules=job.targets,
            task_type="CAUSAL_LM",
        ),
        callbacks=[_watch(job, clock)],
    )
    if adapter_dtype:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, adapter_dtype))
    trainer.train()
    trainer.model.save_pretrained(folder)
    return _versions("trl", "torch", "transformers", "peft", "bitsandbytes")


def unsloth(job: Job, settings: dict[str, Any], folder: Path, clock: Clock) -> dict[str, str]:
    """Unsloth's FastLanguageModel in TRL's SFTTrainer.

    Settings: those of SFTConfig; `nf4`, `dtype`, `checkpointing`, and `compile` on a CPU.
    """
    import torch
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    settings = {name: value for name, value in settings.items() if name != "compile"}
    nf4, checkpointing = settings.pop("nf4", True), settings.pop("checkpointing", "unsloth")
    dtype = getattr(torch, settings.pop("dtype", job.precision))
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.base,
        max_seq_length=job.length,
        dtype=dtype,
        load_in_4bit=nf4,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        target_modules=job.targets,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        use_gradient_checkpointing=checkpointing,
        random_state=job.seed,
    )
    arguments = {
        "max_length": job.length,
        "completion_only_loss": True,
        **_arguments(job, folder, settings),
        **settings,
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(gradient_checkpointing=bool(checkpointing), **arguments),
        train_dataset=_for_trl(job),
        processing_class=tokenizer,
        callbacks=[_watch(job, clock)],
    )
    trainer.train()
    trainer.model.save_pretrained(folder)
    return _versions("unsloth", "trl", "torch", "transformers", "peft", "bitsandbytes")


def llamafactory(job: Job, settings: dict[str, Any], folder: Path, clock: Clock) -> dict[str, str]:
    """LLaMA-Factory's supervised fine-tuning. Settings: those of its YAML files."""
    from datasets import Dataset
    from llamafactory.hparams import get_train_args
    from llamafactory.train.tuner import run_exp

    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job.base,
        "template": "empty",
        "dataset": "given",
        "tokenized_path": str(folder / "documents"),
        "cutoff_len": job.length,
        "finetuning_type": "lora",
        "lora_rank": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": job.dropout,
        "lora_target": ",".join(job.targets),
        "quantization_bit": 4,
        "bf16": job.precision == "bfloat16",
        **_arguments(job, folder, settings),
        **settings,
    }
    _, data, *_ = get_train_args(dict(arguments))
    columns = _packed_by_llamafactory(job, data) if data.packing else _columns(job)
    Dataset.from_dict(columns).save_to_disk(folder / "documents")
    run_exp(arguments, callbacks=[_watch(job, clock)])
    return _versions("llamafactory", "torch", "transformers", "peft", "bitsandbytes")


def axolotl(job: Job, settings: dict[str, Any], folder: Path, clock: Clock) -> dict[str, str]:
    """Axolotl's causal trainer. Settings: those of its YAML files."""
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset

    documents = folder / "documents.parquet"
    Dataset.from_dict(_columns(job)).to_parquet(documents)
    common = _arguments(job, folder, {"packing": settings.get("sample_packing", False)})
    same = (
        "gradient_accumulation_steps",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "bf16",
        "seed",
        "save_strategy",
    )
    arguments = {
        "base_model": job.base,
        "datasets": [{"path": str(documents), "ds_type": "parquet", "type": ""}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0,
        "sequence_len": job.length,
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_r": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": job.dropout,
        "lora_target_modules": job.targets,
        "micro_batch_size": common["per_device_train_batch_size"],
        "num_epochs": common["num_train_epochs"],
        "lr_scheduler": common["lr_scheduler_type"],
        "optimizer": common["optim"],
        "fp16": False,
        "tf32": False,
        "output_dir": str(folder),
        **{name: common[name] for name in same},
        **settings,
    }
    cfg = load_cfg(DictDefault(arguments))
    trainer, model, *_ = setup_model_and_trainer(cfg, load_datasets(cfg=cfg))
    trainer.add_callback(_watch(job, clock))
    trainer.train()
    model.save_pretrained(folder)
    return _versions("axolotl", "torch", "transformers", "peft", "bitsandbytes")


def _packed_by_llamafactory(job: Job, data: Any) -> dict[str, Any]:
    """Pack the documents by LLaMA-Factory's own packing, but without its tokenization: ours are ids already."""
    from llamafactory.data.processor.supervised import PackedSupervisedDatasetProcessor
    from transformers import AutoTokenizer

    class Given(PackedSupervisedDatasetProcessor):  # type: ignore[misc]
        def _encode_data_example(self, prompt: Any, **_: Any) -> Any:
            return prompt[0]

    nothing: list[Any] = [None] * len(job.documents)
    examples = dict.fromkeys(("_system", "_tools", "_images", "_videos", "_audios"), nothing)
    examples |= {"_prompt": [[document] for document in job.documents], "_response": [[""]] * len(job.documents)}
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    rows = Given(template=None, tokenizer=tokenizer, processor=None, data_args=data).preprocess_dataset(examples)
    return {name: rows[name] for name in ("input_ids", "attention_mask", "labels")}


def _arguments(job: Job, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' Trainer, which all peers use, that make the work the same.

    With packing, a micro-batch has all rows of a step. Without, it has eight documents, the peers' default, and
    gradient accumulation adds up the step. `rows` in the settings replaces the number of rows or documents.
    """
    a_step = job.rows if settings.get("packing") else job.documents_a_step
    at_once = min(a_step, settings.pop("rows", job.rows if settings.get("packing") else 8))
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": max(1, round(a_step / at_once)),
        "num_train_epochs": 1,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": job.seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
        "bf16": job.precision == "bfloat16",
    }


def _columns(job: Job) -> dict[str, Any]:
    """The documents as columns, for the peers that take labels."""
    ids, labels = zip(*job.documents, strict=True)
    return {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids], "labels": labels}


def _for_trl(job: Job) -> Any:
    """The documents as TRL has them after tokenizing. With labels instead of a mask, Unsloth would not pack them."""
    from datasets import Dataset

    masks = [[int(label != IGNORED) for label in labels] for _, labels in job.documents]
    return Dataset.from_dict({"input_ids": [ids for ids, _ in job.documents], "completion_mask": masks})


def _watch(job: Job, clock: Clock) -> Any:
    """A Trainer callback that counts the tokens of each batch and ends the clock's steps."""
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            self.counts: list[torch.Tensor] = []
            model.register_forward_pre_hook(self._count, with_kwargs=True)
            _forget(job)
            clock.begin()

        def _count(self, _: Any, __: Any, inputs: dict[str, Any]) -> None:
            ids, labels = inputs["input_ids"], inputs["labels"]
            places = torch.full((), ids.numel(), device=ids.device)
            # Added up after the step: reading it back now would stall the GPU.
            self.counts.append(torch.stack([(ids != job.pad).sum(), (labels != IGNORED).sum(), places]))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step(torch.stack(self.counts).sum(0))
            self.counts.clear()

    return Watch()


def _forget(job: Job) -> None:
    """Reset the GPU's peak memory, so that it does not include loading."""
    if job.device == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in packages}


FUNCTIONS = {"remint": remint, "trl": trl, "unsloth": unsloth, "llamafactory": llamafactory, "axolotl": axolotl}

if __name__ == "__main__":
    main()
