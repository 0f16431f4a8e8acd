"""Which model classes of transformers other programs read: vLLM by its own code, and llama.cpp's converter.

Plain data, by the name in `architectures` of config.json, as of 2026-11: what vLLM's registry of text generation models
and llama.cpp's converter list. A class that came later is not in it yet.
"""

# Class: its name in the gguf format, which `gguf` lists.
LLAMA_CPP = {
    "AfmoeForCausalLM": "afmoe", "ApertusForCausalLM": "apertus", "ArceeForCausalLM": "arcee",
    "BambaForCausalLM": "granitehybrid", "BloomForCausalLM": "bloom", "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "command-r", "DbrxForCausalLM": "dbrx", "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2", "Dots1ForCausalLM": "dots1", "Ernie4_5ForCausalLM": "ernie4_5",
    "Ernie4_5_MoeForCausalLM": "ernie4_5-moe", "Exaone4ForCausalLM": "exaone4", "FalconForCausalLM": "falcon",
    "FalconH1ForCausalLM": "falcon-h1", "FalconMambaForCausalLM": "mamba", "GPT2LMHeadModel": "gpt2",
    "GPTBigCodeForCausalLM": "starcoder", "GPTNeoXForCausalLM": "gptneox", "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3", "Gemma3ForConditionalGeneration": "gemma3", "Gemma3nForCausalLM": "gemma3n",
    "Gemma3nForConditionalGeneration": "gemma3n", "Gemma4ForCausalLM": "gemma4",
    "Gemma4ForConditionalGeneration": "gemma4", "GemmaForCausalLM": "gemma", "Glm4ForCausalLM": "glm4",
    "Glm4MoeForCausalLM": "glm4moe", "Glm4MoeLiteForCausalLM": "deepseek2", "GlmForCausalLM": "chatglm",
    "GlmMoeDsaForCausalLM": "glm-dsa", "GptOssForCausalLM": "gpt-oss", "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granitemoe", "GraniteMoeHybridForCausalLM": "granitehybrid",
    "GraniteMoeSharedForCausalLM": "granitemoe", "HunYuanDenseV1ForCausalLM": "hunyuan-dense",
    "HunYuanMoEV1ForCausalLM": "hunyuan-moe", "Jais2ForCausalLM": "jais2", "JambaForCausalLM": "jamba",
    "KimiLinearForCausalLM": "kimi-linear", "Lfm2ForCausalLM": "lfm2", "Lfm2MoeForCausalLM": "lfm2moe",
    "Llama4ForCausalLM": "llama4", "LlamaForCausalLM": "llama", "Mamba2ForCausalLM": "mamba2",
    "MambaForCausalLM": "mamba", "MiMoV2FlashForCausalLM": "mimo2", "MiniCPM3ForCausalLM": "minicpm3",
    "MiniMaxM2ForCausalLM": "minimax-m2", "Ministral3ForCausalLM": "mistral3", "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama", "NemotronForCausalLM": "nemotron", "NemotronHForCausalLM": "nemotron_h",
    "Olmo2ForCausalLM": "olmo2", "Olmo3ForCausalLM": "olmo2", "OlmoForCausalLM": "olmo", "OlmoeForCausalLM": "olmoe",
    "Phi3ForCausalLM": "phi3", "PhiForCausalLM": "phi2", "Qwen2ForCausalLM": "qwen2", "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3moe", "Qwen3NextForCausalLM": "qwen3next",
    "Qwen3_5ForCausalLM": "qwen35", "Qwen3_5MoeForCausalLM": "qwen35moe", "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3", "SolarOpenForCausalLM": "glm4moe", "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2", "YoutuForCausalLM": "deepseek2",
}  # fmt: skip
VLLM = {
    "AfmoeForCausalLM", "ApertusForCausalLM", "ArceeForCausalLM", "BambaForCausalLM", "BloomForCausalLM",
    "Cohere2ForCausalLM", "CohereForCausalLM", "CwmForCausalLM", "DbrxForCausalLM", "DeepseekV2ForCausalLM",
    "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM", "Dots1ForCausalLM", "Ernie4_5ForCausalLM",
    "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "FalconForCausalLM", "FalconH1ForCausalLM",
    "FalconMambaForCausalLM", "FlexOlmoForCausalLM", "FuyuForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM",
    "GPTJForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration",
    "Gemma3nForCausalLM", "Gemma3nForConditionalGeneration", "GemmaForCausalLM", "Glm4ForCausalLM",
    "Glm4MoeForCausalLM", "GlmForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM", "HunYuanDenseV1ForCausalLM",
    "HunYuanMoEV1ForCausalLM", "Jais2ForCausalLM", "JambaForCausalLM", "KimiLinearForCausalLM", "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM", "Llama4ForCausalLM", "LlamaForCausalLM", "LongcatFlashForCausalLM", "Mamba2ForCausalLM",
    "MambaForCausalLM", "MiMoV2FlashForCausalLM", "MiniCPM3ForCausalLM", "MiniMaxForCausalLM", "MiniMaxM2ForCausalLM",
    "MistralForCausalLM", "MixtralForCausalLM", "MptForCausalLM", "NemotronForCausalLM", "NemotronHForCausalLM",
    "OPTForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "OlmoeForCausalLM",
    "PersimmonForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "SeedOssForCausalLM", "StableLmForCausalLM",
    "Starcoder2ForCausalLM", "Zamba2ForCausalLM",
}  # fmt: skip


def commands(folder: str, architecture: str | None) -> dict[str, str]:
    """Return the commands of the programs that read the model class, by what they are for; `folder` is quoted."""
    found = {}
    if architecture in VLLM:
        found["serve it with vLLM"] = f"vllm serve {folder}"
    if architecture in LLAMA_CPP:
        found["convert it for llama.cpp"] = f"python convert_hf_to_gguf.py {folder} --outfile model.gguf"
    return found


def notes(architecture: str | None) -> list[str]:
    """Return a sentence on each program that does not list the model class."""
    name = architecture or "a model whose config.json names no class"
    lines = []
    if architecture not in VLLM:
        lines.append(f"vLLM has no {name} of its own: no command for it; its transformers backend may serve it")
    if architecture not in LLAMA_CPP:
        lines.append(f"llama.cpp's converter does not know {name}: no command for it")
    return lines
