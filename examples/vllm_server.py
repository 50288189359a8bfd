# /// script
# requires-python = ">=3.11"
# dependencies = ["maple-trl"]
# ///
"""
MAPO whose completions a vLLM server samples; the trainer's environment needs no vLLM.

    maple-trl vllm-serve --model_name_or_path Qwen/Qwen2.5-Omni-3B --port 8000 --max_model_length 10240
    accelerate launch examples/vllm_server.py --dataset_name data/rows --media_root data/clips

The embedded model and data, on a CPU (the server with vLLM's build for one):

    maple-trl vllm-serve --model_name_or_path builtin:tiny-omni --port 8000 --max_model_length 1024
    accelerate launch examples/vllm_server.py --config examples/tiny.yaml
"""

from trl import ScriptArguments, TrlParser

from maple_trl import MAPOConfig, MAPOTrainer
from maple_trl.rewards import accuracy_reward, format_reward
from maple_trl.train import OmniModelConfig, load_datasets, load_for_training


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, MAPOConfig, OmniModelConfig))
    # What neither --config nor the command line says.
    parser.set_defaults_with_config(
        model_name_or_path="Qwen/Qwen2.5-Omni-3B",
        dtype="bfloat16",
        use_peft=True,
        lora_vision=False,  # frozen towers read each clip once
        lora_audio=False,
        output_dir="runs/vllm_server",
        # The server is handed tokens, features and positions, and after each step the weights.
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url="http://127.0.0.1:8000",
        num_frames=16,
        max_pixels=224 * 224,
        prompt_template="think",
        max_completion_length=512,
        num_generations=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        learning_rate=1e-5,
        reward_weights=[0.1, 1.0],
    )
    script_args, training_args, model_args = parser.parse_args_and_config()

    # Dataset: the server never reads a clip
    splits, training_args.media_root = load_datasets(script_args, training_args.media_root)

    # Model
    model, processor, peft_config = load_for_training(model_args, training_args)

    # Training
    trainer = MAPOTrainer(
        model=model,
        reward_funcs=[format_reward, accuracy_reward],
        args=training_args,
        train_dataset=splits[script_args.dataset_train_split],
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()

    # Save and push
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
