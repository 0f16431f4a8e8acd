"""The command line: every argument with its group and its help."""

import argparse

import deepspeed
from transformers import SchedulerType

from utils.data.cache import default_cache_folder
from utils.logging.trackers import CHOICES
from utils.run_config import HERE

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def build_parser() -> argparse.ArgumentParser:
    """The parser of main.py."""
    parser = argparse.ArgumentParser(
        description="Supervised fine-tuning of a causal language model with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_data_arguments(parser)
    _add_model_arguments(parser)
    _add_training_arguments(parser)
    _add_checkpoint_arguments(parser)
    _add_lora_arguments(parser)
    _add_long_context_arguments(parser)
    _add_run_arguments(parser)
    _add_scale_arguments(parser)
    deepspeed.add_config_arguments(parser)
    return parser


# One argument per two or three lines reads better than one word per line.
# fmt: off
def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data_path", nargs="*", default=["Dahoas/rm-static"], metavar="NAME",
        help="data sets: hub names, folders whose path contains such a name, or any file or folder of json, jsonl, "
        "parquet or csv; several are mixed; NAME:0.3 trains on that share of the set's rows, NAME:2 on all twice")
    add("--data_split", default="2,4,4", metavar="A,B,C",
        help="shares of phases 1, 2 and 3; the default leaves the reward and RLHF phases their data")
    add("--sft_only_data_path", nargs="*", default=[], metavar="NAME",
        help="data sets used whole for this phase, none by default")
    add("--columns", default=None, metavar="ROLE=COLUMN,...",
        help="columns of your own data by role (messages, prompt, chosen, rejected, response, instruction, input, "
        "output); none: columns have these names")
    add("--chat_template", default="auto", metavar="FORMAT",
        help="text of your own data: auto, the tokenizer's chat template, else human_assistant, but prompts that end "
        "in Assistant: as they stand; human_assistant; none, prompts and answers as they stand; or a jinja file")
    add("--data_output_path", default=default_cache_folder(), metavar="DIR",
        help="cache of split indexes and tokenised data; best on a node's own disk")
    add("--streaming", type=int, nargs="?", const=10_000, default=None, metavar="N",
        help="for data larger than the disk: read rows as they are needed and shuffle N samples at a time (10000 "
        "without N); needs --max_steps and --data_split 10,0,0; None: data is prepared whole, and shuffled whole")
    add("--max_seq_len", type=int, default=512, metavar="TOKENS",
        help="longer samples are cut (and counted); 512 holds most dialogues")
    add("--preprocessing_num_workers", type=int, default=None, metavar="N",
        help="tokenising processes; by default as many as there are cores and work for them")
    add("--padding", choices=["free", "longest", "max_length"], default="free",
        help="free: samples end to end in one row, none attends to another; longest: pad to the longest in the "
        "batch; max_length: pad all to --max_seq_len, the original's way. Same loss, free is fastest")
    add("--packing", action="store_true",
        help="count batches in rows of --max_seq_len filled with whole samples (best fit), not in samples; off, "
        "since a step then holds more samples")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, metavar="NAME",
        help="a folder with model and tokenizer, or a hub name")
    add("--gradient_checkpointing", action="store_true",
        help="compute activations twice instead of keeping them: slower, far less memory")
    add("--disable_dropout", action="store_true",
        help="turn every dropout of the model off; off by default, as the model was configured")
    add("--dropout", type=float, default=None, metavar="P",
        help="set every dropout of the model; None leaves the model's own")
    add("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
        help="auto: bf16 where the device has it, else fp16 on a GPU, else fp32")
    add("--compute_fp32_loss", action="store_true",
        help="compute the loss in float32; it always is here, the flag keeps old command lines working")
    add("--add_eot_token", action="store_true",
        help="add --eot_token as a special token and end every sample with it; off: the tokenizer's own eos")
    add("--eot_token", default="<|endoftext|>", metavar="TOKEN",
        help="the token --add_eot_token adds; the default is the one GPT models use")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--per_device_train_batch_size", type=int, default=16, metavar="N",
        help="samples per forward on each device (micro batch); 16 is the original's")
    add("--per_device_eval_batch_size", type=int, default=16, metavar="N",
        help="samples per evaluation forward on each device; it changes no figure, 16 is the original's")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N",
        help="micro batches per optimizer step; 1 takes a step after each")
    add("--learning_rate", type=float, default=1e-3, metavar="LR",
        help="peak rate of all weights but LoRA's; 1e-3 suits small models, full runs of big ones want about 1e-5")
    add("--weight_decay", type=float, default=0.0, metavar="W",
        help="AdamW's decay, never on biases and layer norms; short fine-tuning needs none")
    add("--num_train_epochs", type=int, default=1, metavar="N",
        help="passes over the training data; more overfit small sets")
    add("--max_steps", type=int, default=None, metavar="N",
        help="optimizer steps in all, in place of --num_train_epochs; None counts epochs")
    add("--lr_scheduler_type", type=SchedulerType, default=SchedulerType.COSINE, metavar="NAME",
        choices=[SchedulerType(name) for name in SCHEDULES],
        help=f"one of {', '.join(SCHEDULES)}; cosine needs no tuning")
    add("--num_warmup_steps", type=int, default=0, metavar="N",
        help="optimizer steps over which the rate rises from 0; pretrained models do without")
    add("--seed", type=int, default=1234, metavar="N",
        help="decides splits, order and dropout; 1234 gives the splits of the published runs")
    add("--completion_only_loss", action="store_true",
        help="label only the response; off, as in the original, where the prompt is learned too")
    add("--neftune_noise_alpha", type=float, default=None, metavar="A",
        help="noise on the embeddings while training (NEFTune), 5 is usual; None adds none")
    add("--print_loss", action="store_true",
        help="print the loss of every optimizer step; off, since printing waits for the device")
    add("--eval_steps", type=int, default=None, metavar="N",
        help="measure perplexity every N optimizer steps too; None: before training and after each epoch")
    add("--early_stopping_patience", type=int, default=None, metavar="N",
        help="stop after N evaluations in a row without a lower loss; None never does")
    add("--max_bad_steps", type=int, default=3, metavar="N",
        help="stop after N steps in a row whose loss or gradients are not finite; such steps are skipped, and 3 "
        "in a row don't mend themselves")


def _add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("checkpoints").add_argument
    add("--save_strategy", choices=["no", "steps", "epoch"], default=None,
        help="when to write a checkpoint a run can go on from; None: steps with --save_steps, else no (they are large)")
    add("--save_steps", type=int, default=None, metavar="N",
        help="a checkpoint every N optimizer steps; None: see --save_strategy")
    add("--save_total_limit", type=int, default=2, metavar="K",
        help="keep the newest K; 2, so that one is left should the newest be damaged; 0 keeps all")
    add("--save_only_model", action="store_true",
        help="write models instead of checkpoints: a fraction of the size, but no run goes on from them")
    add("--resume_from_checkpoint", nargs="?", const="latest", default=None, metavar="PATH",
        help="go on from this checkpoint; without PATH or with latest, from the newest of --output_dir, and from the "
        "start where there is none. None starts anew")
    add("--resume_anyway", action="store_true",
        help="go on although arguments or data have changed since; off, since it is then another run")
    add("--load_best_model_at_end", action="store_true",
        help="save the model of the lowest evaluation loss in place of the last; off: the last, as the original")


def _add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_dim", type=int, default=0, metavar="R",
        help="rank of the added weights; 0 trains without LoRA")
    add("--lora_module_name", default="decoder.layers.", metavar="PART[,PART]",
        help="wrap linear layers whose name contains this, or one of several; auto: those of the blocks, in any model "
        "family; the default is OPT's blocks, the original's")
    add("--lora_alpha", type=float, default=1.0, metavar="A",
        help="LoRA adds its product times A / R, as in PEFT; 1 is the original's, PEFT users often take 2 R")
    add("--lora_dropout", type=float, default=0.0, metavar="P",
        help="dropout before the added weights; 0, the original's; --disable_dropout and --dropout leave it alone")
    add("--only_optimize_lora", action="store_true",
        help="train the added weights alone; off: wrapped weights are frozen, everything else trains")
    add("--lora_learning_rate", type=float, default=5e-4, metavar="LR",
        help="the added weights' own peak rate; 5e-4, since weights that start from zero want a high one")
    add("--save_lora_adapter", action="store_true",
        help="also write the added weights alone, in PEFT's format, to OUTPUT_DIR/adapter; off, since the saved "
        "model has them merged in; needs --only_optimize_lora")


def _add_long_context_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("long context").add_argument
    add("--sequence_parallel_size", type=int, default=1, metavar="N",
        help="ranks that share every row of tokens, each with a share of the attention heads (DeepSpeed Ulysses); a "
        "micro batch is then one of N ranks; 1, since a row that fits one device is faster there")
    add("--tiled_mlp", action="store_true",
        help="compute the blocks' MLPs a piece of the row at a time, and again in the backward: less memory for long "
        "rows; off, since it is slower and short rows gain nothing")
    add("--activation_offloading", action="store_true",
        help="keep what --gradient_checkpointing keeps in CPU memory until the backward; off, since copying takes time")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run and DeepSpeed").add_argument
    add("--output_dir", default=None, metavar="DIR",
        help="where the model, metrics and loss curve go; none: nothing is saved")
    add("--zero_stage", type=int, choices=[0, 1, 2, 3], default=0,
        help="ZeRO: 1 shards optimizer states, 2 gradients too, 3 weights too; 0 is fastest where it fits")
    add("--offload", nargs="?", const="cpu", default=None, choices=["cpu", "nvme"],
        help="keep optimizer states (and weights, with ZeRO 3) in CPU memory, or with nvme in files below --nvme_path; "
        "off, since both are slower")
    add("--local_rank", type=int, default=-1, metavar="N",
        help="set by the launcher; -1 for a plain start")
    add("--ddp_timeout", type=int, default=1800, metavar="SECONDS",
        help="longest wait of one rank for the others; half an hour outlasts a slow disk, not a dead rank")
    add("--dry_run", nargs="?", const=HERE, default=None, metavar="GPUSxGB",
        help="check everything, prepare the data, print the plan with its memory and time, and train nothing; with "
        "64x80 for 64 GPUs of 80 GB each instead of this machine; off")
    add("--logging_steps", type=int, default=10, metavar="N",
        help="bring figures over from the device and say them every N optimizer steps; 10, since that waits for it")
    add("--report_to", nargs="*", default=["none"], choices=CHOICES,
        help="send the figures there too, through DeepSpeed's monitor; none: they are in OUTPUT_DIR/metrics.jsonl")
    add("--enable_tensorboard", action="store_true",
        help="the original's name of --report_to tensorboard; off, since few look at them")
    add("--tensorboard_path", default="step1_tensorboard", metavar="DIR",
        help="where the curves go; the default is the original's")


def _add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("big models").add_argument
    add("--max_shard_size", default="5GB", metavar="SIZE",
        help="largest file of weights in a saved model, as 5GB or 200MB: what rank 0 holds while it saves; 5GB is few "
        "files for a large model, and one for a small")
    add("--nvme_path", default=None, metavar="DIR",
        help="a folder on a local disk for the swap files of --offload nvme; None: there is no such disk by itself")
    add("--zero_hpz_partition_size", type=int, default=1, metavar="N",
        help="ZeRO 3 keeps a second copy of the weights split over N ranks, those of a node, so that the backward "
        "gathers from them alone; 1 keeps none, since it takes memory")
    add("--enable_mixed_precision_lora", action="store_true",
        help="hold LoRA's frozen weights in 8 bits (ZeRO 3 and fp16 on CUDA GPUs); off, since it rounds them")
# fmt: on


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the command line of main.py, or of a program (`description`) that takes the same arguments.

    `utils.arguments.preflight.check_run` checks it.
    """
    parser = build_parser()
    parser.description = description or parser.description
    args = parser.parse_args(argv)
    if args.save_strategy is None:
        args.save_strategy = "no" if args.save_steps is None else "steps"
    return args
