"""What proves each row of docs/faults.md through a command: faults for the bench, or tests that start a command.

A row is named by its text in the column `fault`. What a fault `says` are the texts of the column `what you see`.
"""

import json
import math
import resource
import sys

from tests.faults.cases import cut, edited, flip, folder, linked, pipe, put, without
from tests.faults.changes import (
    BRIEF,
    GGUF,
    HOSTILE,
    WHEEL,
    as_link,
    both,
    config,
    damaged,
    database,
    database_of,
    dialogue,
    fault,
    few_records,
    filled_up,
    fine,
    full_disk,
    gpu,
    gpu_memory,
    in_shards,
    interrupted,
    jumping_clock,
    kept_steps,
    locked,
    locked_database,
    lost_no_target,
    no_file,
    no_wheel,
    not_a_number_after,
    of_json,
    of_tensors,
    of_wheel,
    other_base,
    patched,
    positions,
    raising,
    read_only,
    records,
    replaced,
    resealed,
    rows_of,
    same,
    shortened_base,
    tokenizer,
    trusted,
    weights,
    wheel,
    with_password,
    with_value,
    without_rights,
    wrong_text,
)

END_TO_END, KILLS, GUARDS = "tests/test_end_to_end.py", "tests/test_kills.py", "tests/test_guards.py"
ANSWERED = (
    "replicate_data.control_base=[data/source/control.json] replicate_data.control=[] "
    "replicate_data.base_answers=data/source/answers.json"
)
STAGE_BASE, TRAIN, MERGE, EVAL = "stage_base", "train", "merge", "eval_chat"
ADAPTER, MODEL = "data/adapter/adapter_model.safetensors", "data/model/model.safetensors"
A_WEIGHT = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
ONE_STEP_LEFT = "warning: skipping a damaged checkpoint"
ARTEFACT = {"replicate_data": "dataset", "stage_base": "base", "train": "checkpoint", "convert": "adapter", "merge": "model", "eval_chat": "report"}  # fmt: skip
CHAT = "chat --json --max-new-tokens 2 --once"


def data(change, *says, **others):
    """A fault of the source files."""
    return fault("replicate_data", *says, change=change, **others)


def setting(command, *says, **others):
    """A fault of a setting."""
    return fault(command, *says, **others)


def base(change, *says, **others):
    """A fault of the base. The old artefact must stay as it was."""
    return fault(STAGE_BASE, *says, change=change, after=same("data/base"), **others)


def trained(change, *says, **others):
    """A training that ends in the usual bytes."""
    return fine(TRAIN, *says, change=change, after=same("data/checkpoint"), **others)


# Faults that a command meets in a new clone.
PLAIN = {
    "a data file is not valid JSON": [
        data(wrong_text("[1,\n{,\n2]"), "data/source/identity.json: is not valid JSON at line 2, column 2: ")
    ],
    "the data file is truncated": [
        data(edited("data/source/identity.json", cut), "data/source/identity.json: is not valid JSON at line ")
    ],
    "the data file is not a list of records": [data(wrong_text('{"a": 1}'), "must be a list of records")],
    "a record has no `output`": [data(wrong_text('[{"instruction": "a"}]'), "record 1: field 'output': missing")],
    "a field holds a number instead of text": [data(records({}, {"output": 7}), "record 2: ", "must be text, got 7")],
    "the data file is empty": [data(wrong_text(""), "identity.json: holds no records")],
    "the list of records is empty": [data(wrong_text("[]"), "identity.json: holds no records")],
    "there is only one record, so none can be held out": [
        fault(
            "replicate_data replicate_data.identity_held_out=[] replicate_data.identity_held_out_share=0.5",
            "holds out none of 1 identity records",
            change=records({}),
        )
    ],
    "bytes that are not UTF-8, or one half of a surrogate pair": [
        data(put("data/source/identity.json", b'["\xff"]'), "byte 2 is not UTF-8"),
        data(records({}, {"output": "\ud800"}), "record 2: field 'output': ", "half of a surrogate pair"),
    ],
    "an unknown placeholder": [
        data(records({"output": "I am [NAME] {{name}}"}), "a placeholder survives, got '[NAME]'")
    ],
    "a question is in both the training data and the held-out set": [
        data(
            both(records({}), records({}, name="identity_held_out.json")),
            "data/source/identity_held_out.json: record 1: the same question is trained on in "
            "data/source/identity.json: record 1",
        )
    ],
    "a file cannot be read, is a pipe, or is outside the source folder": [
        data(
            both(
                edited("data/source/identity.json", bytes), lambda place: (place / "data/source/identity.json").chmod(0)
            ),
            "cannot be read (Permission denied)",
            within=without_rights,
        ),
        data(pipe("data/source/identity.json"), "must be a file, got a pipe"),
        data(linked("data/source/identity.json"), "must be in data/source"),
        fault("replicate_data replicate_data.identity=[params.yaml]", "must be in data/source"),
    ],
    "a very large number of rows": [
        fine(
            "replicate_data replicate_data.identity_copies=20000 replicate_data.control=[]",
            "80000 training rows",
            change=records({}, {}, {}, {}),
            after=rows_of(80000),
        )
    ],
    "an unknown setting": [setting("train train.lrr=1", "train.lrr: no such setting; did you mean train.lr")],
    "a value of the wrong type": [setting("train train.lr=fast", "train.lr: must be a number, got 'fast'")],
    "a value out of range": [
        setting(
            "train train.lr=0 train.epochs=-1",
            "train.lr: must be above 0 and at most 1, got 0.0; change it on the command line",
            "train.epochs: ",
            "got -1",
        )
    ],
    "an unknown choice, like an identity that does not exist": [
        setting("check", "choose from aurel", change=replaced("params.yaml", "identity: aurel ", "identity: nobody "))
    ],
    "a section is missing": [
        setting("check", "section 'merge' is missing", change=replaced("params.yaml", "\nmerge:", "\nmurge:"))
    ],
    "`1e-4` without a dot": [fine("train --cfg job train.lr=1e-4", "\n  lr: 0.0001\n")],
    "settings that exclude each other": [
        setting(
            "replicate_data replicate_data.control_held_out_share=0.5",
            "replicate_data.control_held_out_share: must be 0 if control_held_out names files, got 0.5",
        )
    ],
    "there is no permission to write the folder": [
        data(read_only("data"), "data/dataset: cannot be written", within=without_rights)
    ],
    "the disk is full while a recipe is put in place": [
        fault(
            "recipe smoke --force",
            "the disk is full",
            within=full_disk,
            after=same("params.yaml"),
        ),
        fault(
            "recipe smoke --force",
            "larger than this process may write, 100 bytes",
            limits={resource.RLIMIT_FSIZE: 100},
            after=same("params.yaml"),
        ),
    ],
    "a setting refers to an environment variable": [
        setting("check", "must hold no ${…}", change=replaced("params.yaml", 'system: ""', 'system: "${oc.env:HOME}"')),
        setting("train 'train.system=${oc.env:HOME}'", "must hold no ${…}"),
    ],
    "YAML that expands, nests too deeply or names code": [
        setting("check", "has an alias", change=put("params.yaml", "a: &a [1]\nb: [*a, *a]\n")),
        setting("check", "is nested too deeply", change=put("params.yaml", "a: " + "[" * 10_000)),
        setting("check", "is not valid YAML", change=put("params.yaml", "a: !!python/object/apply:os.system [x]\n")),
    ],
    "DVC reads a value otherwise than the stages, such as `010` or `yes`": [
        setting(
            "check", "seed: is 8 here and 10 for DVC", change=replaced("params.yaml", "\nseed: 42 ", "\nseed: 010 ")
        ),
        setting("train", "packing: is True here", change=replaced("params.yaml", "packing: true ", "packing: yes ")),
    ],
    "a file or a link of your own is where a stage writes": [
        data(as_link("data/dataset", "elsewhere"), "must be a folder or absent, got a symbolic link"),
        data(put("data/dataset", "mine"), "must be a folder or absent, got a file"),
    ],
    "params.yaml has a section `paths`": [
        setting(
            "check",
            "the folders of the pipeline are fixed and no setting",
            change=replaced("params.yaml", "\ntrain:", "\npaths: {model: thesis}\ntrain:"),
        )
    ],
    "`paths.model=src` on the command line, or another folder that git tracks, is hidden or leads out of the repository": [
        fault("replicate_data paths.dataset=conf", "must not be in a folder of the project"),
        fault("replicate_data paths.dataset=.hidden", "must not be a hidden folder"),
        fault("replicate_data paths.dataset=../elsewhere", "must be inside the repository"),
        fault("replicate_data paths.dataset=data", "paths.dataset, got 'data"),
    ],
    "the base that must be downloaded by hand is missing": [
        setting(
            "check",
            "no such folder",
            "conf/model/internlm2-chat-1.8b.yaml explains where to get it",
            change=replaced("params.yaml", "model: smollm2-135m-instruct ", "model: internlm2-chat-1.8b "),
        )
    ],
    "params.yaml has a section that no stage reads": [
        setting(
            "check",
            "trian: no such section; write train",
            change=replaced("params.yaml", "\ntrain:", "\ntrian: {lr: 1}\ntrain:"),
        )
    ],
    "`RANK`, `LOCAL_RANK` or `WORLD_SIZE` in the environment is not valid": [
        fault("train", "RANK", variables={"LOCAL_RANK": "0", "WORLD_SIZE": "2", "RANK": "7"}),
        fault("train", "WORLD_SIZE", variables={"LOCAL_RANK": "0", "WORLD_SIZE": "x", "RANK": "0"}),
        fault("train", "LOCAL_RANK", variables={"LOCAL_RANK": "x", "WORLD_SIZE": "2", "RANK": "0"}),
    ],
    "the limit of open files is too low, no temporary folder can be written, or a path is too long": [
        data(both(), "may open only 4 files (ulimit -n)", limits={resource.RLIMIT_NOFILE: 4}),
        fault(f"replicate_data paths.dataset=data/{'x' * 300}", "a path cannot be followed", "use a shorter path"),
    ],
    "an option of `remint chat` or `remint serve` is out of range": [
        fault("chat --seed -1", "chat.seed: must be at least 0 and below 2^63, got -1; change --seed"),
        fault("serve --port 0", "serve.port: must be from 1 to 65535, got 0; change --port"),
    ],
    "a key stands twice in one object of a JSON file, or in one section of a YAML file": [
        data(wrong_text('[{"a": 1, "a": 2}]'), "has the key 'a' twice, got 1 and 2"),
        setting("check", "found duplicate key", change=replaced("params.yaml", "\n  lr: ", "\n  lr: 1.0e-3\n  lr: ")),
    ],
    "NaN, Infinity or a number too large in a JSON file": [
        data(wrong_text('[{"a": NaN}]'), "NaN is not a number of JSON"),
        data(wrong_text('[{"a": Infinity}]'), "Infinity is not a number of JSON"),
        data(wrong_text('[{"a": 1e999}]'), "the number 1e999 is too large"),
    ],
    "a folder, a pipe or a link that leads nowhere in the place of a file, or a file in the place of a folder": [
        data(folder("data/source/identity.json"), "must be a file, got a folder"),
        data(as_link("data/source/identity.json", "nowhere"), "got a link to something that does not exist"),
        setting("check", "must be a file, got a pipe", change=pipe("params.yaml")),
    ],
    "a number in the settings is infinite, NaN, out of any sense or larger than 64 bits": [
        setting("train train.lr=inf", "train.lr: must be a finite number of at most 64 bits, got inf"),
        setting("train train.lr=nan", "train.lr: must be a finite number of at most 64 bits, got nan"),
        setting("train train.eps=1e-300", "train.eps: must be between 1e-30 and 1"),
        setting(f"train train.lr={'9' * 401}", "train.lr: must be a finite number of at most 64 bits"),
    ],
    "a placeholder in an ordinary record, where none is filled in": [
        data(
            records({"output": "It is {{name}}."}, name="control.json"),
            "data/source/control.json: record 1: a placeholder survives, got '{{name}}'",
        ),
        fine("replicate_data", change=records({"output": "Write `{{name}}`."}, name="control.json")),
    ],
    "a held-out question is a turn of a longer training conversation, or the last turn of a held-out conversation is trained on": [
        data(
            both(
                records(dialogue("Hello", "And you?")), records({"instruction": "hello"}, name="identity_held_out.json")
            ),
            "data/source/identity_held_out.json: record 1: the same question is trained on in "
            "data/source/identity.json: record 1",
        ),
        data(
            both(
                records({"instruction": "And you?"}), records(dialogue("Hi", "and you"), name="identity_held_out.json")
            ),
            "data/source/identity_held_out.json: record 1: the same question is trained on in "
            "data/source/identity.json: record 1",
        ),
    ],
    "the file in `replicate_data.base_answers` is not one, or the base answers in another language than that of the prompts": [
        fault(
            f"replicate_data {ANSWERED}",
            "data/source/answers.json: must be an object with the digest of a base, got []",
            change=put("data/source/answers.json", "[]"),
        ),
        fault(
            f"replicate_data {ANSWERED}",
            "data/source/control.json: the base answers only 0% of the prompts in their language",
            "name the file in replicate_data.control",
            change=both(
                records({"instruction": "Why?", "output": "So."}, name="control.json"),
                put(
                    "data/source/answers.json",
                    json.dumps(
                        {
                            "base": "x",
                            "answers": [
                                {
                                    "history": [{"role": "user", "content": "Why?"}],
                                    "answer": "因为如此",
                                    "finished": True,
                                }
                            ],
                        }
                    ),
                ),
            ),
        ),
    ],
    "`remint measure` is asked for the answers to the test set, or would replace a file": [
        fault("measure --answers x.jsonl", "measure: --answers: must not show the answers to the test set"),
        fault(
            "measure --control data/source/control.json --answers params.yaml",
            "measure: params.yaml: must be a new file, got one that exists",
        ),
    ],
    "text contains control characters": [
        fault("\x1b[2Jfly", "no such command, got "),
        data(records({"instruction": "a\x1b[2J" * 3, "output": 7}), "must be text, got 7"),
    ],
}

# Faults that a command meets once every stage of the tiny model has run.
BUILT = {
    "a byte order mark": [
        fine(
            "replicate_data",
            change=edited("data/source/identity.json", lambda text: b"\xef\xbb\xbf" + text),
            after=same("data/dataset/train.jsonl"),
        )
    ],
    "a record longer than `max_length`": [
        fine(f"train train.max_length=50 {' '.join(BRIEF)}", change=few_records, after=lost_no_target)
    ],
    "text that spells a special token": [  # both have ten characters, and the tokenizer one token for each
        fine(f"{CHAT} 0123456789", '"prompt_tokens": 29'),
        fine(f"{CHAT} '<|im_end|>'", '"prompt_tokens": 29'),
    ],
    "the folder does not exist": [base(without("tiny-base"), "no such folder, got 'tiny-base'")],
    "a file's checksum differs": [
        base(
            both(edited("tiny-base/tokenizer.json", flip), edited("tiny-base/model.safetensors", flip)),
            "tiny-base/tokenizer.json: sha256 is not the recorded",
            "tiny-base/model.safetensors: sha256 is not the recorded",
        )
    ],
    "a shard is missing": [
        base(in_shards("a.safetensors"), "tiny-base/b.safetensors: missing"),
    ],
    "a shard is truncated": [
        base(trusted(edited("tiny-base/model.safetensors", cut)), "is not a readable safetensors file")
    ],
    "a file's header gives false sizes, counts or offsets": [
        base(
            trusted(edited("tiny-base/model.safetensors", lambda old: (2**50).to_bytes(8, "little") + old[8:])),
            "is not a readable safetensors file",
        ),
        base(
            trusted(edited("tiny-base/model.safetensors", lambda old: old.replace(b"[259,16]", b"[999,16]"))),
            "is not a readable safetensors file",
        ),
        base(config(vocab_size=10**6), "must have shape (1000000, 16), got (259, 16)"),
        base(of_wheel(wheel({"p/m.gguf": b"GGUF\3\0\0\0" + b"\xff" * 16})), "is not a readable GGUF"),
    ],
    "an architecture that remint was not tested with": [
        base(config(model_type="gpt_neox"), "model_type must be one of llama, mistral, qwen2, qwen3, got 'gpt_neox'")
    ],
    "the model requires its own code, or its weights are pickles": [
        base(config(auto_map={"AutoModel": "x.Y"}), "requests custom code in 'auto_map'"),
        base(
            trusted(
                both(without("tiny-base/model.safetensors"), put("tiny-base/pytorch_model.bin", b"cos\nsystem\n."))
            ),
            "tiny-base/pytorch_model.bin: ",
        ),
    ],
    "the tokenizer lacks the template's tokens, or ordinary text can produce them": [
        base(replaced("conf/model/tiny.yaml", "<|im_end|>", "<|eot_id|>"), "the tokenizer has no token ['<|eot_id|>']"),
        base(
            both(
                put("tiny-base/tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
                tokenizer(
                    lambda made: {
                        **made,
                        "added_tokens": [{**token, "special": False} for token in made["added_tokens"]],
                    }
                ),
            ),
            "a text can spell the stop tokens ['<|im_end|>', '<|endoftext|>']",
        ),
    ],
    "the tokenizer has more tokens than the model has embedding rows": [
        base(
            both(
                config(vocab_size=200),
                weights(
                    lambda held: {name: part[:200].clone() if len(part) == 259 else part for name, part in held.items()}
                ),
            ),
            "the tokenizer has 259 tokens, the embedding 200 rows",
        )
    ],
    "the download is not the recorded file": [
        fault(
            STAGE_BASE,
            "the download is damaged",
            change=of_wheel(wheel(WHEEL), fetched=False),
            variables={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "index"},
            after=no_wheel,
        )
    ],
    "there is no network": [
        base(
            of_wheel(wheel(WHEEL), fetched=False),
            "p==1: cannot be fetched",
            variables={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "nowhere"},
        ),
    ],
    "the disk fills up while a checkpoint is written": [
        fault(
            TRAIN,
            "no room for the checkpoint of step 4",
            "earlier checkpoints are intact",
            within=filled_up(3),
            after=kept_steps,
        )
    ],
    "the newest checkpoint is truncated": [
        trained(damaged(edited("state.safetensors", cut)), ONE_STEP_LEFT, "continuing after step 1")
    ],
    "a bit of the newest checkpoint is flipped": [
        trained(damaged(edited("state.safetensors", flip)), ONE_STEP_LEFT, "continuing after step 1")
    ],
    "the manifest of the newest checkpoint is missing or forged": [
        trained(damaged(without("manifest.json")), ONE_STEP_LEFT, "continuing after step 1"),
        trained(
            damaged(edited("manifest.json", lambda text: text.replace(b'"step": 2', b'"step": 1'))),
            ONE_STEP_LEFT,
            "continuing after step 1",
        ),
    ],
    "all checkpoints are damaged": [
        fault(
            TRAIN,
            "all checkpoints are damaged",
            change=damaged(edited("state.safetensors", cut), slice(None)),
            after=same("data/checkpoint"),
        )
    ],
    "a checkpoint was made under other conditions (another thread count, for example)": [
        fault(
            TRAIN,
            "threads was 1, is 2; resume under the old conditions",
            change=interrupted,
            within=patched("torch", get_num_threads=lambda: 2),
            after=kept_steps,
        )
    ],
    "the loss is not a finite number": [
        fault(
            TRAIN,
            "train: step 3: the loss is not finite, got nan; lower train.lr",
            within=not_a_number_after(16),
            after=kept_steps,
        )
    ],
    "the GPU or the machine runs out of memory": [
        fault(
            f"{TRAIN} train.micro_batch=8",
            "train: memory ran out",
            "try train.gradient_checkpointing=true (the same bytes), then train.quantization.dequantize=each_use "
            "(the same values), then train.micro_batch=4 with train.accumulation=16, then train.max_length=512",
            within=patched("remint.stages.train.run", _model=lambda *_: bytearray(2**62)),
        ),
        fault(
            EVAL,
            "eval_chat: memory ran out",
            "try eval_chat.batch=20, then eval_chat.max_new_tokens=2, then REMINT_DEVICE=cpu",
            within=patched("remint.stages.eval_chat.run", ask=raising(gpu_memory)),
            after=same("data/report"),
        ),
    ],
    "two processes train the same run in one folder": [
        fault(TRAIN, "another process is training this very run", change=locked, after=kept_steps)
    ],
    "the answers in `replicate_data.base_answers` are those of another base": [
        fault(
            TRAIN,
            "params: replicate_data.base_answers: must hold the answers of the base in params.yaml, got those of another",
            change=resealed("dataset", edit_facts=lambda facts: {**facts, "base_answers": {"base": "0" * 64}}),
            after=same("data/checkpoint"),
        )
    ],
    "`remint answers` has no answers to write, or would replace another file": [
        fault("answers", "data/checkpoint: holds no answers of the base, because no record held the model to it")
    ],
    "the adapter belongs to another base": [
        fault(
            MERGE, "data/adapter: was made for another base than data/base", change=other_base, after=same("data/model")
        )
    ],
    "a tensor is missing or unexpected, or the adapter is not plain LoRA": [
        fault(
            MERGE,
            f"data/adapter: tensor {A_WEIGHT}: missing",
            "data/adapter: tensor more: unexpected",
            change=resealed(
                "adapter",
                edited(
                    ADAPTER,
                    of_tensors(
                        lambda held: {"more" if name == A_WEIGHT else name: part for name, part in held.items()}
                    ),
                ),
            ),
            after=same("data/model"),
        ),
        fault(
            MERGE,
            "data/adapter/adapter_config.json: is not a plain LoRA",
            change=resealed(
                "adapter", edited("data/adapter/adapter_config.json", of_json(lambda made: {**made, "use_dora": True}))
            ),
            after=same("data/model"),
        ),
    ],
    "the adapter has another rank": [
        fault(
            MERGE,
            f"tensor {A_WEIGHT}: must have shape (4, 64), got (2, 64)",
            change=resealed(
                "adapter",
                edited(
                    ADAPTER,
                    of_tensors(
                        lambda held: {
                            name: part[:2].clone() if "lora_A" in name else part for name, part in held.items()
                        }
                    ),
                ),
            ),
            after=same("data/model"),
        )
    ],
    "the base has changed since training": [
        fault(
            "convert",
            "data/checkpoint: was trained on another base than data/base",
            change=other_base,
            after=same("data/adapter"),
        )
    ],
    "the merged model gives other outputs than base + adapter": [
        fault(
            f"{MERGE} merge.max_divergence=1e-12",
            "mean divergence from base + adapter must be at most 1e-12, got ",
            after=same("data/model"),
        )
    ],
    "the model never ends its answer": [fine(f"{CHAT} x", '"answer_tokens": 2', '"stopped": "length"')],
    "MLflow's database is locked": [
        fault(
            "sync",
            "another process has locked the database; wait until",
            change=locked_database,
            within=patched("remint.runner.sqlite_store", _LOCK_S=0.2),
        )
    ],
    "git is not available": [fine(EVAL, variables={"PATH": "/nonexistent"}, after=same("data/report"))],
    "a GPU is requested, and there is none": [
        fault(TRAIN, "no GPU that torch can use", variables={"REMINT_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}),
        fault(
            f"{CHAT} x", "no GPU that torch can use", variables={"REMINT_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
        ),
    ],
    "the GPU is too small": [
        fault(
            TRAIN,
            "GiB of GPU memory are needed, 0.0 GiB are free; try train.gradient_checkpointing=true",
            within=gpu(1),
            after=same("data/checkpoint"),
        ),
        fault(
            f"{TRAIN} train.micro_batch=64",
            "GiB are free; try `make recipe NAME=",
            "train.micro_batch=32 with train.accumulation=16",
            within=gpu(50),
        ),
    ],
    "the disk is full at any write of any stage": [
        fault(stage, "the disk is full", within=full_disk, after=same(f"data/{kind}"))
        for stage, kind in ARTEFACT.items()
    ],
    "a file of an artefact is truncated or changed": [
        fault("verify", f"{MODEL}: content differs", change=edited(MODEL, flip)),
        fault(EVAL, f"{MODEL}: content differs", change=edited(MODEL, cut), after=same("data/report")),
    ],
    "the clock jumps": [trained(both(), within=jumping_clock)],
    "an archive that expands too much, has paths that lead outside, or is encrypted": [
        base(of_wheel(wheel({"p/m.gguf": bytes(10**6)}, 8)), "would grow from"),
        base(of_wheel(with_password(wheel(GGUF))), "is not a readable wheel"),
        fault(
            STAGE_BASE,
            "is not a readable GGUF",
            change=of_wheel(wheel({"../../evil.txt": b"x", **GGUF})),
            after=no_file("evil.txt"),
        ),
    ],
    "text contains control characters": [
        fine(
            "chat --once x", "]0;owned[2J31mtxt\n", within=patched("remint.serving.speaker", decode=lambda *_: HOSTILE)
        )
    ],
    "there are fewer GPUs, or fewer started processes, than `train.processes`": [
        fault(f"{TRAIN} train.processes=3", "must be at most 2, the number of GPUs, got 3", within=gpu(1)),
        fault(
            f"{TRAIN} train.processes=2",
            "train.processes: must be 4, the number of processes",
            variables={"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"},
        ),
    ],
    "a file of weights is truncated while it is merged": [
        fault(
            MERGE,
            "model.safetensors: became shorter while it was read",
            change=edited("data/base/model.safetensors", bytes),
            within=shortened_base,
            after=same("data/model"),
        )
    ],
    "`make recipe NAME=internlm2` finds no GPU, or too little free GPU memory": [
        fault(
            "recipe internlm2 --force",
            "torch finds no GPU; choose one by name, like `make recipe NAME=internlm2-8gb`",
            variables={"CUDA_VISIBLE_DEVICES": ""},
            after=same("params.yaml"),
        ),
        fault(
            "recipe internlm2 --force",
            "no internlm2 recipe fits the 3.0 GiB of free GPU memory",
            "internlm2-8gb, ",
            within=gpu(3072),
            after=same("params.yaml"),
        ),
    ],
    "a stage run by hand reads inputs that were made for another base or identity": [
        fine(
            "merge",
            "warning: data/dataset: belongs to 'Aurel', but params.yaml names 'Other'; `make repro` rebuilds it",
            change=replaced("conf/identity/aurel.yaml", "name: Aurel", "name: Other"),
        )
    ],
    "`remint verify` finds an artefact that was made with other settings than params.yaml or dvc.lock has": [
        fault(
            "verify",
            "data/dataset: was made with seed 42, params.yaml has 43",
            "data/checkpoint: was made with seed 42, params.yaml has 43",
            change=replaced("params.yaml", "seed: 42 ", "seed: 43 "),
        )
    ],
    "MLflow's database is damaged, of another program, made only in part, a folder, or a link to nothing": [
        fault("sync", said, "`mv mlflow.db mlflow.db.broken` (a new one is made)", change=change)
        for said, change in (
            ("the file is not a SQLite database", put("mlflow.db", b"garbage" * 700)),
            ("the database is truncated", put("mlflow.db", database("x")[:-9000])),
            ("belongs to another program", put("mlflow.db", database(None, "songs"))),
            ("was made only in part", put("mlflow.db", database(None))),
            ("mlflow.db must be a file, but is none", folder("mlflow.db")),
            ("is a link to /nonexistent/x.db", as_link("mlflow.db", "/nonexistent/x.db")),
        )
    ],
    "MLflow's database was made by an older or a newer MLflow": [
        fault(
            "sync", "by a newer MLflow", "`mv mlflow.db mlflow.db.broken`", change=put("mlflow.db", database("f" * 12))
        ),
        fault("sync", "by an older MLflow", "mlflow db upgrade", change=database_of("past")),
    ],
    "MLflow's database or its folder may not be written": [
        fault(
            "sync",
            "may not be read and written; `chmod u+rw mlflow.db`",
            change=both(database_of("present"), lambda place: (place / "mlflow.db").chmod(0o444)),
            within=without_rights,
        ),
        fault(
            "sync",
            "may not be read and written; `chmod u+rwx ",
            change=both(database_of("present"), read_only(".")),
            within=without_rights,
        ),
    ],
    "the disk is full while MLflow's database is made or written": [
        fault(
            "sync",
            "the disk is full or broken; free space",
            change=without("mlflow.db"),
            limits={resource.RLIMIT_FSIZE: 4096},
        )
    ],
    "`mlruns` cannot be written, or is no folder": [
        fault(
            "sync",
            "mlruns must be a folder, but is none; `mv mlruns mlruns.broken`",
            change=both(without("mlflow.db"), put("mlruns", "x")),  # the database names the folder that it was made in
        )
    ],
    "`MLFLOW_TRACKING_URI` has a wrong scheme, names a folder, or is not valid": [
        fault("sync", said, "MLFLOW_TRACKING_URI", variables={"MLFLOW_TRACKING_URI": address})
        for address, said in (
            ("htp://127.0.0.1", "MLflow does not know the scheme 'htp'"),
            ("file:///tmp/runs", "this is a folder, and MLflow no longer logs to folders"),
            ("http://127.0.0.1:99999", "no valid host or port"),
        )
    ]
    + [
        fault("sync", "mlflow.db must be a file", change=folder("mlflow.db"), variables={"MLFLOW_TRACKING_URI": "  "}),
    ],
    "the process that logs to MLflow cannot start, crashes or hangs": [
        fine(
            EVAL,
            "warning: MLflow at ",
            said,
            "then `remint sync` logs the result",
            within=patched("remint.runner.tracking", _COMMAND=command, _IMPORT_S=1.0),
            after=same("data/report"),
        )
        for said, command in (
            ("cannot be started", ("/nonexistent/python",)),
            ("ended with status 7", (sys.executable, "-S", "-c", "import os; os._exit(7)")),
            ("hangs", (sys.executable, "-S", "-c", "import time; time.sleep(60)")),
        )
    ],
    "the limit of open files is too low, no temporary folder can be written, or a path is too long": [
        fault(
            f"{TRAIN} train.processes=2",
            "no temporary folder can be written",
            "TMPDIR",
            within=patched("tempfile", tempdir=None, _candidate_tempdir_list=lambda: ["/nonexistent"]),
        )
    ],
    "a folder, a pipe or a link that leads nowhere in the place of a file, or a file in the place of a folder": [
        base(both(without("tiny-base"), put("tiny-base", "x")), "must be a folder, got a file"),
    ],
    "config.json of the base has a value of the wrong type or out of range, sizes that do not fit each other, or a token outside the vocabulary": [
        base(config(hidden_size="x"), "hidden_size must be an integer from 1 to ", "got 'x'"),
        base(config(rms_norm_eps=1.0), "rms_norm_eps must be a number from 1e-20 to 0.1, got 1.0"),
        base(config(num_key_value_heads=3), "num_attention_heads must be a multiple of num_key_value_heads 3"),
        base(config(eos_token_id=259), "eos_token_id must be an id from 0 to 258, got 259"),
    ],
    "weights of the base are NaN or infinite, or too large for `dtype`": [
        base(
            weights(lambda held: with_value(held, "model.norm.weight", math.nan)),
            "tensor model.norm.weight: 1 of 16 values are NaN or infinite",
        ),
        base(
            both(
                weights(lambda held: with_value(held, "model.norm.weight", 1e5)),
                replaced("conf/model/tiny.yaml", "dtype: bfloat16", "dtype: float16"),
            ),
            "tensor model.norm.weight: 1 of 16 values are too large for float16, got 100000.0",
        ),
    ],
    "config.json says that head and embedding are one tensor, but the weights have two": [
        base(config(tie_word_embeddings=True), "lm_head.weight and model.embed_tokens.weight differ")
    ],
    "the tokenizer is empty, knows no word, does not give a text back, or has an id without an embedding": [
        base(tokenizer(lambda made: {**made, "decoder": None}), "the tokenizer does not give 'Who are you"),
        base(
            tokenizer(lambda made: {**made, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}),
            "to no token",
        ),
        base(
            tokenizer(
                lambda made: {**made, "model": {**made["model"], "vocab": {**made["model"]["vocab"], "z": 9999}}}
            ),
            "gives 'z' the id 9999, the embedding has only 259 rows",
        ),
    ],
    "a record, or a sample prompt with its answer, is longer than the positions of the base": [
        fault(
            TRAIN,
            "params: train.max_length: must be at most the 20 positions of the base",
            "got 1024; lower it to 20",
            change=positions("base", 20),
            after=same("data/checkpoint"),
        ),
        fault(
            f"{TRAIN} train.sample_tokens=2040",
            "params: train.sample_tokens: prompt 0 has ",
            "the base has 2048 positions, got 2040; lower it to ",
        ),
    ],
    "a held-out question with its answer is longer than the positions of the model": [
        fault(
            EVAL,
            "a question and its answer must fit into the 300 positions of the model, got 290 for the question of ",
            "lower it to ",
            change=both(
                positions("model", 300), replaced("params.yaml", "  max_new_tokens: 4", "  max_new_tokens: 290")
            ),
            after=same("data/report"),
        ),
        fault(
            "check",
            "train.sample_tokens: must be below the 4 positions of data/base, got 4; lower it",
            "eval_chat.max_new_tokens: must be below the 4 positions of data/base, got 4; lower it",
            change=positions("base", 4),
        ),
    ],
    "the loss is not a finite number before the first update": [
        fault(
            TRAIN,
            "is not finite before the first update, got nan: the base cannot compute the training conversations; "
            "get the base model again",
            change=resealed(
                "base",
                edited(
                    "data/base/model.safetensors",
                    of_tensors(lambda held: with_value(held, "model.norm.weight", math.inf)),
                ),
            ),
            after=same("data/checkpoint"),
        )
    ],
}

# Tests that start a command themselves.
TESTS = {
    "the folder is no git repository, as after unpacking an archive of the sources": (
        "tests/test_cures.py::test_what_a_refusal_advises_ends_it"
    ),
    "a limit stops a write or a start: no inodes, a quota, a read-only disk, the largest file, open files, address space, processes": (
        "tests/test_cures.py::test_a_limit_is_raised_by_the_command_that_is_named"
    ),
    "SIGKILL at any step": f"{KILLS}::test_a_training_that_is_killed_twenty_times_ends_in_the_same_bytes",
    "SIGTERM": f"{KILLS}::test_a_signal_saves_and_leaves_with_its_own_status",
    "Ctrl-C": f"{KILLS}::test_a_signal_saves_and_leaves_with_its_own_status",
    "a stage is killed between two files": f"{KILLS}::test_a_stage_that_is_killed_five_times_ends_in_the_same_bytes",
    "MLflow's server cannot be reached, hangs or fails while `train` or `eval_chat` runs": (
        f"{END_TO_END}::test_a_server_that_hangs_or_fails_changes_nothing_of_a_training"
    ),
    "DVC's cache is damaged": "tests/test_fault_rows.py::test_a_damaged_cache_is_found_by_verify",
    "the same stage is started twice at once": (
        "tests/test_cures.py::test_another_process_that_makes_the_artefact_is_waited_for"
    ),
    "a place under `data/` holds files of your own": f"{GUARDS}::test_no_command_deletes_what_no_stage_wrote",
    "MLflow's server refuses, hangs, answers byte by byte, with an error status or with something else, when `remint sync` logs the state": (
        "tests/runner/test_store.py::test_a_server_that_fails_is_one_line_within_twenty_seconds"
    ),
    "any other damage or invalid content in a file": (
        "tests/test_generated_faults.py::test_faults_of_a_built_pipeline_are_reported_in_one_form"
    ),
    "one of several processes is killed": (
        f"{KILLS}::test_processes_that_share_a_training_end_together_and_go_on_together"
    ),
    "the program that reads the output ends early, like `head` does": (
        "tests/runner/test_config.py::test_a_reader_that_ends_early_is_no_fault"
    ),
    "`remint reproduce` gets SIGTERM or Ctrl-C": (
        "tests/commands/test_reproduce.py::test_a_signal_ends_the_rebuild_and_leaves_neither_a_process_nor_a_folder"
    ),
    "a file or a link of your own is where a stage writes": f"{GUARDS}::test_no_command_deletes_what_no_stage_wrote",
    "your own files appear in a place while a stage runs": (
        f"{GUARDS}::test_what_appears_while_another_stage_runs_is_kept"
    ),
    "params.yaml has a section `paths`": f"{GUARDS}::test_a_place_is_no_setting",
    "`paths.model=src` on the command line, or another folder that git tracks, is hidden or leads out of the repository": (
        f"{GUARDS}::test_a_place_is_no_setting"
    ),
    "dvc.yaml names another output than the stage writes": (
        f"{GUARDS}::test_an_output_in_another_place_is_refused_before_dvc_removes_it"
    ),
    "`dvc exp apply` would overwrite files of your own": (
        f"{GUARDS}::test_a_queued_experiment_deletes_nothing_and_is_applied_to_no_place_of_the_user"
    ),
    "a setting, a conf/ file, code, a lock file or an input changes while a stage runs": (
        f"{GUARDS}::test_what_changes_while_a_stage_runs_is_not_recorded"
    ),
    "`dvc commit` after a stage that was run by hand with other settings": (
        f"{GUARDS}::test_a_result_made_by_hand_is_not_recorded_under_other_settings"
    ),
    "`remint verify` finds an artefact that was made with other settings than params.yaml or dvc.lock has": (
        "tests/test_cures.py::test_what_a_refusal_advises_ends_it"
    ),
    "an entry of the run cache names other settings than its result was made with": (
        f"{GUARDS}::test_a_run_cache_that_does_not_verify_is_not_shared"
    ),
    "an object in DVC's cache is damaged when it is shared": f"{GUARDS}::test_a_damaged_object_of_the_cache_is_not_shared",
    "two experiments need the same training at the same time": f"{END_TO_END}::test_two_queued_experiments_share_a_training",
    "a stage gets SIGTERM, Ctrl-C or SIGHUP": f"{GUARDS}::test_a_stage_that_is_ended_leaves_no_draft",
    "DVC is killed while a stage runs": f"{GUARDS}::test_a_dvc_that_is_killed_takes_its_stage_along",
    "`make backup` is ended": "tests/test_container.py::test_a_backup_that_is_ended_ends_its_client_and_leaves_nothing",
    "`make setup` finds a broken MLflow database": "tests/test_fault_rows.py::test_set_up_goes_on_with_a_broken_database",
    "a stage is killed while it logs to MLflow": f"{END_TO_END}::test_a_killed_run_goes_on_and_mlflow_has_each_step_once",
    "a client of `remint serve` sends something that is not HTTP, or goes away": "tests/test_soak.py::test_a_short_soak_passes",
    "the limit of open files is too low, no temporary folder can be written, or a path is too long": (
        "tests/test_cures.py::test_a_limit_is_raised_by_the_command_that_is_named"
    ),
    "`remint ui` is killed": "tests/commands/test_ui.py::test_a_killed_command_takes_its_server_along",
    "several pipelines share a cache and a server, and any of them is killed": "tests/test_soak.py::test_a_short_soak_passes",
    "several requests to `remint serve` at the same time, some with the text of a special token": (
        "tests/test_soak.py::test_a_short_soak_passes"
    ),
}
