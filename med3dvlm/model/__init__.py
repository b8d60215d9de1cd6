"""Models: encoders, projectors, the dual encoder, the language model, and their checkpoints.

Importing this makes both models known to transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from med3dvlm.configuration import CLIPConfig, VLMConfig
from med3dvlm.model.clip import CLIPModel
from med3dvlm.model.vlm import VLMForCausalLM

AutoConfig.register(CLIPConfig.model_type, CLIPConfig)
AutoConfig.register(VLMConfig.model_type, VLMConfig)
# transformers has a CLIPConfig of its own and compares names; `exist_ok` because ours is another class.
AutoModel.register(CLIPConfig, CLIPModel, exist_ok=True)
AutoModelForCausalLM.register(VLMConfig, VLMForCausalLM)
