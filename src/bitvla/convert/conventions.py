"""The conventions of the published BitVLA checkpoints that are in their code, not in their files.

Sources: arXiv 2506.07530 and the official repository, ustcwhy/BitVLA: `bitvla/constants.py` (token ids),
`convert_ckpt.py` (chat template), `prismatic/vla/constants.py` (LIBERO's chunk), `experiments/robot/` (images, state,
gripper). The base models' prompt is that of the port of lxsy/bitvla-bf16 to Core AI, which was compared with the
official code.
"""

from __future__ import annotations

from bitvla.config import Camera, ChatConfig, ImageProcessing, ProcessingConfig, PromptConfig, Statistics

# Rows of the text embedding. After 128,010 tokens of Llama 3 come <|image_pad|>, <proprio_pad> and the action tokens.
FINETUNE_VOCABULARY = 128264  # 252 action tokens
PRETRAINED_VOCABULARY = 128268  # 256 action tokens
PRETRAINED_BINS = 256

TOKEN_IDS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,  # ends the sequence
    "<|pad|>": 128002,
    "<|eot_id|>": 128009,
    "<|image_pad|>": 128010,
    "<proprio_pad>": 128011,
}
FIRST_ACTION_ID = 128012  # <action_0>

# The chat template of `convert_ckpt.py`, with what the official code puts in front (the token that begins a text, which
# the tokenizer adds) and into it (the images without the line breaks around them, the proprio token, the question).
TEMPLATE = (
    "<|begin_of_text|>System: A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.<|eot_id|>"
    "User: {images}<proprio_pad>What action should the robot take to {instruction}?<|eot_id|>Assistant: "
)

# BitNet b1.58 2B4T, without the tokens for images, state and actions. The chat template of its tokenizer_config.json,
# with the system prompt of BitVLA.
LANGUAGE_VOCABULARY = 128256
LANGUAGE_TOKEN_IDS = {token: TOKEN_IDS[token] for token in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")}
CHAT = ChatConfig(
    begin=TEMPLATE[: TEMPLATE.index("User: ")],
    turn="User: {prompt}<|eot_id|>Assistant: ",
    stop_tokens=("<|eot_id|>", "<|end_of_text|>"),
)

# What base models are asked. Unlike a fine-tune, they are causal (their text and their action tokens are written one
# after the other; the bidirectional mask came with the action slots), and keep the line break after the image (LLaVA).
_BASE_TURN = "Human: {images}\n{prompt}<|eot_id|>Assistant: "
PRETRAINED_TEMPLATE = CHAT.begin + _BASE_TURN.replace("{prompt}", "What action should the robot take to {instruction}?")
# The processor of SigLIP in their preprocessor_config.json.
SIGLIP = ImageProcessing(resize="bicubic", crop_area=1.0, mean=0.5, std=0.5)

# The third-person image comes first, then those of the wrists.
CAMERAS = {1: ("full",), 2: ("full", "wrist"), 3: ("full", "left_wrist", "right_wrist")}
LIBERO_VIEWS = 2  # the published fine-tunes
LIBERO_HORIZON = 8
LIBERO_STATE = {
    "eef_x": "m", "eef_y": "m", "eef_z": "m", "axis_angle_x": "rad", "axis_angle_y": "rad", "axis_angle_z": "rad",
    "finger_left": "m", "finger_right": "m",
}  # fmt: skip
# Commands of the OSC_POSE controller: shares of its largest step, not metres.
LIBERO_ACTION = dict.fromkeys(("x", "y", "z", "roll", "pitch", "yaw", "gripper"), "1")
LIBERO_IMAGE_SIZE = 256


def libero_processing(state: Statistics, action: Statistics, views: int) -> ProcessingConfig:
    """What stands between a LIBERO robot and a published fine-tune.

    Images are those of the simulator, upside down as it renders them; the policy turns them.
    """
    return ProcessingConfig(
        cameras=tuple(Camera(name=name, height=LIBERO_IMAGE_SIZE, width=LIBERO_IMAGE_SIZE) for name in CAMERAS[views]),
        image=ImageProcessing(
            rotate180=True, jpeg_quality=95, resize="lanczos", crop_area=0.9, rounding="tensorflow", mean=0.5, std=0.5
        ),
        prompt=PromptConfig(template=TEMPLATE, lower_case=True, max_instruction_tokens=128),
        state=state,
        action=action,
        control_hz=20.0,
        execute_horizon=LIBERO_HORIZON,
        gripper="libero",
    )


def base_chat(image_token: str) -> ChatConfig:
    """How a vision-language base model is asked, with images and without."""
    return ChatConfig(
        begin=CHAT.begin,
        turn=_BASE_TURN.replace("{images}\n", ""),
        turn_with_images=_BASE_TURN,
        image_token=image_token,
        stop_tokens=CHAT.stop_tokens,
    )


def pretrained_processing(action: Statistics, image_size: int, control_hz: float) -> ProcessingConfig:
    """What stands between a robot and the pre-trained base model, which sees one image and takes no state.

    It was trained on robots of many kinds, so the camera is one that delivers what the network sees.
    """
    return ProcessingConfig(
        cameras=(Camera(name=CAMERAS[1][0], height=image_size, width=image_size),),
        image=SIGLIP,
        prompt=PromptConfig(template=PRETRAINED_TEMPLATE, lower_case=True, max_instruction_tokens=128),
        state=Statistics(names=(), units=(), low=(), high=(), mask=()),
        action=action,
        control_hz=control_hz,
        execute_horizon=1,
    )
