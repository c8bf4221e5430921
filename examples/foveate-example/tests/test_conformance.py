from foveate.testing.conformance import PluginConformance, SourceConformance


class TestPlugin(PluginConformance):
    entry_point = "example"


class TestModel(SourceConformance):
    reference = "example/block-vit"
