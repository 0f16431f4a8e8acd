"""Every argument of main.py, with its group and its help: what it does, then the reason of the default."""

import argparse

from utils.logging.trackers import CHOICES
from utils.notation import HERE
from utils.shared_flags import add_shared

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


# One argument per two or three lines reads better than one word per line.
# fmt: off
def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "data"."""
    add = parser.add_argument_group("data").add_argument
    add("--data_path", nargs="*", default=["Dahoas/rm-static"], metavar="NAME",
        help="data sets to train on: hub names, folders whose path contains a known name, or files and folders of "
        "json, jsonl, parquet or csv; several are mixed; NAME:0.3 uses 0.3 of a set's rows, NAME:2 each row twice; "
        "the default is the original's")
    add_shared(add, "data_split",
        help="shares of the rows for phases 1, 2 and 3; this program trains on the first; None means 2,4,4 for known "
        "data sets, which leaves rows for the reward and RLHF phases, and all rows of data of your own")
    add_shared(add, "sft_only_data_path",
        help="data sets used whole for this phase, beside --data_path; none, as in the original")
    add_shared(add, "eval_data_path",
        help="data sets to evaluate on, whole; all other rows are then trained on; none: the evaluation rows of "
        "--data_path, or a tenth of its rows")
    add_shared(add, "columns",
        help="names of the columns of your own data by role (messages, prompt, chosen, rejected, response, "
        "instruction, input, output); None: the columns have these names")
    add_shared(add, "chat_template",
        help="how your own data become text: auto, by the tokenizer's chat template, else human_assistant, but "
        "unchanged where a prompt is rendered already; human_assistant; none, prompts and answers unchanged; or a "
        "jinja file; auto, since it is what the model was trained with")
    add_shared(add, "template_date",
        help="the date that a chat template writes where it asks for today's; None takes today, which is printed")
    add_shared(add, "data_output_path",
        help="cache folder of split indexes and tokenized data; by default per user on the node's own disk, the "
        "fastest place")
    add("--streaming", type=int, nargs="?", const=10_000, default=None, metavar="N",
        help="read rows while training instead of preparing them first, and shuffle N samples at a time (10000 "
        "without N): for data larger than the disk; needs --max_steps, and --data_split 10,0,0 for known data sets; "
        "None prepares and shuffles all data, the better order")
    add_shared(add, "max_seq_len",
        help="longest sample in tokens; longer ones are truncated and counted; 512 holds most dialogues")
    add_shared(add, "overlong",
        help="what becomes of samples longer than --max_seq_len: truncate, cut at the end; drop, left out and counted; "
        "error, the run ends with the first one's place and length; truncate, as in the original")
    add("--preprocessing_num_workers", type=int, default=None, metavar="N",
        help="tokenizing processes; None starts as many as there are cores and rows for them")
    add("--padding", choices=["free", "longest", "max_length"], default="free",
        help="how samples form a batch: free, end to end in one row, each attending to itself alone; longest, padded "
        "to the longest of the batch; max_length, padded to --max_seq_len as in the original; the loss is the same, "
        "free is fastest")
    add("--packing", action="store_true",
        help="count batches in rows of --max_seq_len tokens filled with whole samples (best fit) instead of in "
        "samples; off, since a step then holds more samples")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "model"."""
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, metavar="NAME",
        help="the model to fine-tune: a folder with weights and tokenizer, or a hub name")
    add_shared(add, "trust_remote_code")
    add("--gradient_checkpointing", "--gradient_checkpoint", action="store_true",
        help="compute activations again in the backward instead of keeping them: far less memory, about a third more "
        "time; off, since it is slower; --gradient_checkpoint is the same flag")
    add("--disable_dropout", action="store_true",
        help="turn every dropout of the model off; off, since the model's own configuration decides")
    add("--dropout", type=float, default=None, metavar="P",
        help="set every dropout of the model to P; None leaves the model's own")
    add_shared(add, "dtype",
        help="precision of the computation; auto takes bf16 where the device has it, else fp16 on a GPU, else fp32")
    add("--tf32", action="store_true",
        help="compute float32 matrix products of fp32 on a GPU in TF32, several times faster; off, since its 10 bits "
        "change results in the fourth digit")
    add("--torch_compile", action="store_true",
        help="compile the transformer blocks by torch.compile, for training batches of one size (--packing, whose rows "
        "are then filled up, or --padding max_length) and ZeRO 0 to 2; off, as the first step waits for the compiler")
    add("--compute_fp32_loss", action="store_true",
        help="accepted for old command lines and without effect: the loss is always computed in float32")
    add_shared(add, "add_eot_token",
        help="add --eot_token as a special token and end every sample with it; off: the tokenizer's own eos ends "
        "samples")
    add_shared(add, "eot_token",
        help="the token that --add_eot_token adds; the default is the one of GPT models")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "training"."""
    add = parser.add_argument_group("training").add_argument
    add("--per_device_train_batch_size", type=int, default=16, metavar="N",
        help="samples, or packed rows, per forward on each device (micro batch); 16 is the original's")
    add("--per_device_eval_batch_size", type=int, default=16, metavar="N",
        help="samples per evaluation forward on each device; it changes speed and memory alone, 16 is the original's")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N",
        help="micro batches per optimizer step; 1 takes a step after each micro batch")
    add("--learning_rate", type=float, default=1e-3, metavar="LR",
        help="peak learning rate of all weights but LoRA's; 1e-3 suits small models, full training of large ones "
        "wants about 1e-5")
    add("--weight_decay", type=float, default=0.0, metavar="W",
        help="AdamW's weight decay, never on biases and layer norms; 0, since short fine-tuning needs none")
    add("--num_train_epochs", type=int, default=1, metavar="N",
        help="passes over the training data; 1, since more overfit small sets")
    add("--max_steps", type=int, default=None, metavar="N",
        help="number of optimizer steps, in place of --num_train_epochs; None counts epochs")
    add("--lr_scheduler_type", choices=SCHEDULES, default="cosine", metavar="NAME",
        help=f"shape of the learning rate: {', '.join(SCHEDULES)}; cosine, since it needs no tuning")
    add("--num_warmup_steps", type=int, default=0, metavar="N",
        help="optimizer steps over which the learning rate rises from 0; 0, since pretrained models do without")
    add_shared(add, "seed",
        help="seed of splits, order and dropout; 1234 gives the splits of the published runs")
    add_shared(add, "completion_only_loss",
        help="compute the loss on the response's tokens alone; off, as in the original, where the prompt is learned "
        "too")
    add_shared(add, "train_turns",
        help="which answers of your own conversations --completion_only_loss labels; all, since each one teaches")
    add("--neftune_noise_alpha", type=float, default=None, metavar="A",
        help="add noise of strength A to the embeddings while training (NEFTune; 5 is usual); None adds none")
    add("--print_loss", action="store_true",
        help="print the loss of every micro batch on every rank, as the original does; off, since reading it "
        "synchronizes with the device")
    add("--eval_steps", type=int, default=None, metavar="N",
        help="measure perplexity every N optimizer steps too; None: before training and after each epoch, as in the "
        "original")
    add("--early_stopping_patience", type=int, default=None, metavar="N",
        help="stop after N evaluations in a row without a lower loss; None never stops early")
    add("--max_bad_steps", type=int, default=3, metavar="N",
        help="stop after N steps in a row whose loss or gradients are not finite; such steps are skipped; 3, since "
        "three in a row rarely recover")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "checkpoints"."""
    add = parser.add_argument_group("checkpoints").add_argument
    add("--save_strategy", choices=["no", "steps", "epoch"], default=None,
        help="when to write a checkpoint that a run can resume from; None means steps where --save_steps is given, "
        "else no, since checkpoints are large")
    add("--save_steps", type=int, default=None, metavar="N",
        help="write a checkpoint every N optimizer steps; None: see --save_strategy")
    add("--save_total_limit", type=int, default=2, metavar="K",
        help="keep the newest K checkpoints, 0 keeps all; 2, so that one is left if the newest is damaged")
    add("--save_only_model", action="store_true",
        help="write models instead of checkpoints, a fraction of the size; off, since a run can't resume from them")
    add("--save_in_background", action="store_true",
        help="copy a checkpoint into CPU memory and write it while the training goes on; off, since the copy takes as "
        "much memory as the checkpoint and a run killed meanwhile goes on from the one before")
    add("--resume_from_checkpoint", nargs="?", const="latest", default=None, metavar="PATH",
        help="resume from the checkpoint in PATH; without PATH or with latest, from the newest of --output_dir, or "
        "from the start where there is none; None starts anew")
    add("--resume_anyway", action="store_true",
        help="resume although arguments, data or base model have changed; off, since the result is then another run")
    add("--load_best_model_at_end", action="store_true",
        help="save the model of the lowest evaluation loss as the final one; off: the last one, as in the original")


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "LoRA"."""
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_dim", type=int, default=0, metavar="R",
        help="rank R of LoRA's added weights; 0 trains without LoRA")
    add("--lora_module_name", default="decoder.layers.", metavar="PART[,PART]",
        help="wrap the linear layers whose name contains PART, or one of several; auto: those of the blocks in any "
        "model family; the default is OPT's blocks, the original's")
    add("--lora_alpha", type=float, default=1.0, metavar="A",
        help="scale LoRA's product by A / R, as in PEFT; 1 is the original's, PEFT users often take 2 R")
    add("--lora_rslora", action="store_true",
        help="scale LoRA's product by A / sqrt(R) instead (rsLoRA), so that a large R learns no slower; off, as in the "
        "original")
    add("--lora_plus_ratio", type=float, default=1.0, metavar="X",
        help="rate of LoRA's left weights, which start at zero, over that of the right ones (LoRA+, whose paper takes "
        "16); 1 trains both alike, as the original does")
    add("--lora_dropout", type=float, default=0.0, metavar="P",
        help="dropout before LoRA's weights, which --disable_dropout and --dropout leave alone; 0 is the original's")
    add("--only_optimize_lora", action="store_true",
        help="train LoRA's weights alone; off: wrapped weights are frozen and everything else trains, as in the "
        "original")
    add("--quantize_base", choices=["nf4"], default=None,
        help="hold the frozen weights of the linear layers in 4 bits (QLoRA: NF4 with double quantization, by "
        "bitsandbytes, which is not in requirements.txt); needs --only_optimize_lora and ZeRO 0 to 2; None, since it "
        "rounds them and is slower")
    add("--lora_learning_rate", type=float, default=5e-4, metavar="LR",
        help="peak learning rate of LoRA's weights; 5e-4, since weights that start from zero want a high rate")
    add("--save_lora_adapter", action="store_true",
        help="also write LoRA's weights alone, in PEFT's format, to OUTPUT_DIR/adapter; needs --only_optimize_lora; "
        "off, since the saved model has them merged in")


def add_long_context_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "long context"."""
    add = parser.add_argument_group("long context").add_argument
    add("--sequence_parallel_size", type=int, default=1, metavar="N",
        help="ranks that share every row of tokens, each computing a share of the attention heads (DeepSpeed "
        "Ulysses); a micro batch is then one of N ranks; 1, since a row that fits one device is faster there")
    add("--tiled_mlp", action="store_true",
        help="compute the blocks' MLPs a piece of the row at a time, and again in the backward: less memory for long "
        "rows; off, since it is slower and short rows gain nothing")
    add("--activation_offloading", action="store_true",
        help="keep the activations that --gradient_checkpointing keeps in CPU memory until the backward; off, since "
        "copying takes time")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "run and DeepSpeed"."""
    add = parser.add_argument_group("run and DeepSpeed").add_argument
    add("--config", default=None, metavar="FILE",
        help="YAML or JSON file of arguments, by the names of the flags; what is typed wins, and --no_SWITCH turns off "
        "a switch that the file turns on; None: what is typed is all")
    add("--like", default=None, metavar="OUTPUT_DIR",
        help="take the arguments of the run that wrote OUTPUT_DIR, from its run.json, all but --output_dir and what "
        "belongs to one start; --config and what is typed win; None takes none")
    add("--output_dir", default=None, metavar="DIR",
        help="folder of the model, metrics and loss curve; None saves nothing")
    add("--zero_stage", type=int, choices=[0, 1, 2, 3], default=0,
        help="ZeRO stage: 1 shards optimizer states over the ranks, 2 gradients too, 3 weights too; 0 is fastest "
        "where it fits")
    add("--offload", nargs="?", const="cpu", default=None, choices=["cpu", "nvme"],
        help="keep optimizer states, and weights at ZeRO 3, in CPU memory, or with nvme in files below --nvme_path; "
        "None, since both are slower")
    add("--fit", nargs="?", const=HERE, default=None, metavar="GB",
        help="choose micro batch, accumulation, gradient checkpointing, ZeRO stage and offload: the fastest that are "
        "estimated to fit the free memory of each device, or GB gigabytes of it; the samples of a step stay, and so "
        "does what is typed (--gradient_accumulation_steps: the cut); None takes the arguments as they are")
    add("--local_rank", type=int, default=-1, metavar="N",
        help="this process's rank on its node, set by the launcher; -1 for a plain start")
    add("--ddp_timeout", type=int, default=1800, metavar="SECONDS",
        help="longest wait of one rank for the others in seconds; half an hour is enough for a slow disk and ends the "
        "run when a rank is dead")
    add("--dry_run", nargs="?", const=HERE, default=None, metavar="GPUSxGB",
        help="check everything, prepare the data, print the plan with its memory and time, and train nothing; 64x80 "
        "plans for 64 GPUs of 80 GB instead of this machine; None trains")
    add("--logging_steps", type=int, default=10, metavar="N",
        help="log every N optimizer steps; 10, since more lines are hard to read; on a GPU a line comes one step late, "
        "so that none waits for the device")
    add("--profile_steps", default=None, metavar="A:B",
        help="write a trace of optimizer steps A to B on rank 0, and a table of where their time goes, to "
        "OUTPUT_DIR/profile; 11:13 leaves out the first steps, which are slower; None, since watching takes time")
    add("--sample_prompts", default=None, metavar="FILE",
        help="answer the prompts of this file at each evaluation, greedily and in the form of the training data, into "
        "OUTPUT_DIR/samples.jsonl: the lines of a .txt, or the prompt or messages of every object in a .json or "
        ".jsonl; None asks nothing")
    add("--report_to", nargs="*", default=["none"], choices=CHOICES,
        help="send the metrics to these services too, through DeepSpeed's monitor; none, since "
        "OUTPUT_DIR/metrics.jsonl holds them")
    add("--enable_tensorboard", action="store_true",
        help="the original's name for --report_to tensorboard; off, as there")
    add("--tensorboard_path", default="step1_tensorboard", metavar="DIR",
        help="folder of TensorBoard's files; the default is the original's")


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "big models"."""
    add = parser.add_argument_group("big models").add_argument
    add("--max_shard_size", default="5GB", metavar="SIZE",
        help="largest file of weights in a saved model, as 5GB or 200MB, and the memory rank 0 needs while it saves; "
        "5GB makes few files")
    add("--nvme_path", default=None, metavar="DIR",
        help="folder on a local disk for the swap files of --offload nvme; None: there is no usual place")
    add("--zero_hpz_partition_size", type=int, default=1, metavar="N",
        help="split a second copy of ZeRO 3's weights over N ranks, those of a node, so that the backward gathers "
        "within the node; 1 keeps no copy, since it takes memory")
    add("--enable_mixed_precision_lora", action="store_true",
        help="hold LoRA's frozen weights in 8 bits (ZeRO 3 and fp16 on CUDA GPUs); off, since it rounds them")


def add_deepspeed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `deepspeed.add_config_arguments` adds, without importing DeepSpeed, which takes seconds."""
    add = parser.add_argument_group("DeepSpeed").add_argument
    add("--deepspeed", action="store_true",
        help="accepted from scripts written for DeepSpeed and without effect: training always runs under DeepSpeed")
    add("--deepspeed_config", metavar="FILE",
        help="json file of DeepSpeed's own settings, for those that have no flag here; what flags decide stays theirs; "
        "None: the flags alone")
    add("--deepscale", action="store_true", help="an older name of --deepspeed")
    add("--deepscale_config", metavar="FILE", help="an older name of --deepspeed_config")
# fmt: on

GROUPS = (
    add_data_arguments,
    add_model_arguments,
    add_training_arguments,
    add_checkpoint_arguments,
    add_lora_arguments,
    add_long_context_arguments,
    add_run_arguments,
    add_scale_arguments,
    add_deepspeed_arguments,
)
