"""The cases of `common_suite.py`: transformers' common tests for ECCL, and for CLIP with the same shapes."""

import unittest

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_processing_common import ProcessorTesterMixin

from eccl import ECCLConfig, ECCLModel, ECCLProcessor
from eccl.processing_eccl import ECCLImageProcessor
from helpers import clip_tokenizer, tiny_config


class DualEncoderTester:
    """What the common tests ask a model's own tests for: a configuration and inputs.

    Args:
        parent: the test case.
        config: makes the configuration.
    """

    # With fewer than seven items, tests fail that have nothing to do with the model.
    batch_size = 12
    seq_length = 9
    num_hidden_layers = 2
    is_training = True

    def __init__(self, parent, config):
        self.parent, self.get_config = parent, config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        text, vision = config.text_config, config.vision_config
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(1, text.bos_token_id, (self.batch_size, self.seq_length), generator=generator)
        input_ids[:, 0], input_ids[:, -1] = text.bos_token_id, text.eos_token_id
        size = [vision.image_size] * 2 if isinstance(vision.image_size, int) else vision.image_size
        pixel_values = torch.rand(self.batch_size, 3, *size, generator=generator)
        attention_mask = torch.ones_like(input_ids)
        return config, {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}


class DualEncoderTests(ModelTesterMixin):
    """The settings that the tests of CLIP and of ECCL share."""

    _is_composite = True
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True
    additional_model_inputs = ["pixel_values"]

    def setUp(self):
        self.model_tester = DualEncoderTester(self, self.make_config)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        # The loss of these models needs no labels.
        return inputs | {"return_loss": True} if return_labels else inputs


class CLIPModelTest(DualEncoderTests, unittest.TestCase):
    all_model_classes = (CLIPModel,)

    @staticmethod
    def make_config():
        config = tiny_config(num_prompt_tokens=0)
        vision = config.vision_config.to_dict() | {"image_size": 32}
        return CLIPConfig(text_config=config.text_config.to_dict(), vision_config=vision, projection_dim=24)


class ECCLModelTest(DualEncoderTests, unittest.TestCase):
    all_model_classes = (ECCLModel,)

    @staticmethod
    def make_config():
        return tiny_config(num_prompt_tokens=0)


class ECCLModelWithPromptsTest(DualEncoderTests, unittest.TestCase):
    all_model_classes = (ECCLModel,)

    @staticmethod
    def make_config():
        config = tiny_config()
        # So the tests that request attentions run, too: with "sdpa" the model refuses the request.
        config._attn_implementation = "eager"
        return config


class CLIPConfigTest(unittest.TestCase):
    make_config = staticmethod(CLIPModelTest.make_config)

    def test_config(self):
        self.model_tester = DualEncoderTester(self, self.make_config)
        ConfigTester(self, config_class=CLIPConfig, has_text_modality=False, projection_dim=24).run_common_tests()


class ECCLConfigTest(unittest.TestCase):
    make_config = staticmethod(tiny_config)

    def test_config(self):
        self.model_tester = DualEncoderTester(self, self.make_config)
        ConfigTester(self, config_class=ECCLConfig, has_text_modality=False, projection_dim=24).run_common_tests()


class CLIPProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = CLIPProcessor

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessorPil(size={"height": 32, "width": 16}, do_center_crop=False)

    @classmethod
    def _setup_tokenizer(cls):
        return clip_tokenizer()


class ECCLProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = ECCLProcessor

    @classmethod
    def _setup_image_processor(cls):
        return ECCLImageProcessor(size={"height": 32, "width": 16})

    @classmethod
    def _setup_tokenizer(cls):
        return clip_tokenizer()
