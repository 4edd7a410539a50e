"""The moving part: a cache fed by watches, a queue of keys, workers that reconcile them."""

from otj_operator.controller.cache import Cache
from otj_operator.controller.controller import Controller
from otj_operator.controller.queue import KeyedQueue
from otj_operator.controller.settings import Settings

__all__ = ["Cache", "Controller", "KeyedQueue", "Settings"]
