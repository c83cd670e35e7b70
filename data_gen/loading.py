"""Loads the stages that a configuration asks for: PyTorch, diffusers, transformers."""

from data_gen.config import DataGenConfig
from data_gen.masks import make_segmenter
from data_gen.stages import PictureSource, Stages


def load_stages(config: DataGenConfig) -> Stages:
    """Loads what the configuration asks for.

    Raises:
      UserError: a model cannot be loaded, or the folder of pictures not be read.
    """
    segmenter = make_segmenter(config.masks)
    return Stages(_load_pictures(config), segmenter)


def _load_pictures(config: DataGenConfig) -> PictureSource:
    # What is imported here takes seconds: a mistake in the configuration is reported before.
    if config.pictures.source == "folder":
        from data_gen.picture_files import PictureFiles

        return PictureFiles(config.pictures, config.candidates)
    import diffusers.utils.logging

    from data_gen.networks import prepare

    prepare()  # before the import, which warns of packages that are not used here
    diffusers.utils.logging.disable_progress_bar()
    from data_gen.pictures import DiffusionPictures

    return DiffusionPictures(config.pictures)
