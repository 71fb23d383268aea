"""What happens on the optimizer's side: the step, and transformations as optax has them."""

from peftjax.training.allocator import RankAllocatorState as RankAllocatorState
from peftjax.training.allocator import prune as prune
from peftjax.training.allocator import rank_allocator as rank_allocator
from peftjax.training.allocator import ranks as ranks
from peftjax.training.step import TrainState as TrainState
from peftjax.training.step import init_train_state as init_train_state
from peftjax.training.step import make_train_step as make_train_step
