"""How long each task is trained, how many questions are asked and when, and how the fits are done.

What this is: two tables, OURS and PAPER: {task: {setting: number}}. train.py takes OURS where the
command line says nothing, and PAPER with `--schedule paper`. Nothing is computed here.
Which STEPs: none; the numbers say when STEPs 0, 2 to 5 and 7 happen.

How to read a schedule, with CartPole's: 300 random steps (STEP 0), then the first session of
questions: 34 pairs (STEPs 2 and 3), a fit of up to 60 epochs (STEP 4), relabelling (STEP 5). A
session more every 300 steps, until 100 pairs are asked. An evaluation (STEP 7) every 500 steps.

Where a comment gives a result, results/README.md has the table or says that it was a single trial.
A number without a reason beside it was not measured by itself.
Shapes: none. Names: OURS, PAPER.

The settings (a step is one of the environment's, a pair is one question to the VLM):
  total_steps        steps in all
  seed_steps         steps with random actions, at the start;  hold: how many steps each one lasts
  explore_steps      steps before the first session: first random actions, then SAC on novelty
  feedback_every     steps between two sessions: a session waits for the end of an episode
  pairs_per_session, max_pairs       pairs in one session, and in all
  sampler            how pairs are picked (reward_model.py)
  reward_lr, reward_epochs, reward_batch   the fit: learning rate, most passes, pairs in one step
  random_shift       px by which a fit moves each image at random;  random_flip: 1 mirrors half
  intercept          1: a fit learns how far the VLM leans to the second image
  sac_lr, batch_size, hidden, updates, discount   SAC; updates: gradient steps in one step
  lr_at_end          share of sac_lr that is left at the end of a run
  layer_norm         1: critics with normalised hidden layers
  eval_every, eval_episodes          steps between evaluations, episodes in each
  average_over       share of all steps over which a policy is averaged for evaluation; 0: the newest

To use it elsewhere:
    from tasks.schedules import OURS
    print(OURS["CartPole"]["total_steps"])
"""

# ---- Ours ----
# What the three Meta-World tasks share. Episodes have 50 steps.
_METAWORLD = dict(
    # Novelty after the random steps: DrawerOpen without it failed on one seed of three.
    seed_steps=1_000, explore_steps=3_000,
    feedback_every=1_000, pairs_per_session=60,
    # Four updates a step with small networks cost about as much as one with large ones. With one,
    # a seed of two did not hold (results/steady.csv).
    sac_lr=1e-3, batch_size=128, hidden=128, updates=4, reward_epochs=20,
    # With many updates to a step, critics without it chase their own errors. SweepInto, progress
    # itself as the reward, one seed: .58 in the last third without it, .98 with it (no CSV).
    layer_norm=1,
    # A shot or a pull takes 10 to 15 steps. For why not .99 see StraightenRope.
    discount=0.95,
    # Near the goal a reward is flat unless somebody was asked about it: an open drawer and one that
    # is 4 cm short of it were worth nearly the same. So half of the questions are about the best
    # images, and the others about rare ones.
    sampler="best",
    # As in the paper, images are not moved.
    random_shift=0,
    eval_every=1_000, eval_episodes=10,
)

# What the rope and the water share. Episodes have 40 and 75 steps.
_ROPE_WATER = dict(
    total_steps=10_000, seed_steps=1_000, explore_steps=2_000, feedback_every=1_000,
    sac_lr=1e-3, batch_size=128, hidden=128, updates=2, reward_epochs=20,
    # The starts are random: a mean over ten of them.
    eval_every=1_000, eval_episodes=10,
)

# The key-and-door grids.
_GRID = dict(
    # Episodes end after 100 steps, not MiniGrid's 250 to 640, so that a run sees more starts.
    total_steps=16_000, seed_steps=1_000, explore_steps=1_000,
    feedback_every=2_000, pairs_per_session=50, max_pairs=1_000,
    sac_lr=1e-3, batch_size=128, hidden=128,
    # An errand takes 5 to 25 steps, and 1 / (1 - 0.95) = 20 steps is how far this looks ahead.
    discount=0.95,
    eval_every=2_000,
)

OURS = {
    "CartPole": dict(
        # The pole is first held within 5 degrees after 1,000 to 1,500 steps (five seeds of five).
        total_steps=2_000,
        # Three episodes of random actions, and no novelty after them: in half of the random steps
        # the pole has fallen as far as it can, so the whole way down is seen.
        seed_steps=300, explore_steps=300,
        # Questions early, at 300, 600 and 900 steps (34 + 34 + 32), while the pole still falls.
        # Later nearly all images are near the goal, and no answer says which of two images far
        # from it is better: asked in five sessions, with larger steps in the fit, Spearman of
        # learned and true reward was .86 to 1.00, with this schedule .95 to 1.00.
        feedback_every=300, pairs_per_session=34, max_pairs=100,
        # A gentle fit: half the learning rate and twice the passes of an earlier schedule. A fit
        # stops by itself once 97 % of its answers are in order, which is before its 60 epochs end.
        reward_lr=5e-5, reward_epochs=60,
        # A mirror image leans by the same angle to the other side and is worth the same, so each
        # answer teaches two. Images are not moved: the cart is drawn in the middle of each.
        random_flip=1, random_shift=0,
        # Small networks and large steps for four numbers. Two updates a step came in together with
        # rewards in units of their spread; with both it learned within 3,000 steps on seeds that
        # had failed.
        sac_lr=1e-3, batch_size=128, hidden=128, updates=2,
        eval_every=500,
    ),
    "DrawerOpen": dict(
        _METAWORLD, total_steps=8_000, explore_steps=2_000,
        # Twelve small sessions, until shortly before the end. With 100 pairs in eight sessions two
        # seeds of eight opened the drawer early, but not as far as they should before step 7,000.
        # (A pair of two equally open drawers is wasted, and there are many.)
        feedback_every=500, pairs_per_session=17, max_pairs=200,
        # LayerNorm lost seeds here (results/README.md).
        layer_norm=0,
    ),
    "Soccer": dict(
        _METAWORLD, total_steps=12_000,
        # Random actions that change at every step cancel out, and the arm trembles where it starts;
        # held for 7 steps they carry it about. Novelty goes on from the places where it has been.
        seed_steps=2_000, hold=7, explore_steps=3_000,
        # Ten sessions, until the end. When five asked all 500 pairs by step 8,000, few were about a
        # ball in the goal.
        pairs_per_session=50, max_pairs=500,
        # A ball that was kicked cannot be caught again: there is little to learn from in an episode.
        # Twice the updates: 1.00 in the last third with seed 2, .60 with four (single trials).
        updates=8,
        # Ball and goal stand in the middle of the image, so left and right are alike.
        random_flip=1,
    ),
    "SweepInto": dict(
        _METAWORLD, total_steps=15_000,
        # The hole is a pit wider than the 5 cm that count: only a reward that is right near the
        # goal tells a cube at its edge from one in its middle. So there are many questions.
        pairs_per_session=120, max_pairs=1_200,
        # With four updates a step, a cube that slid away from the hand was fetched back late, if at
        # all: with seed 1, .6 at step 10,000, and 1.0 at 9,000 with eight (single trials).
        updates=8,
        # The camera looks along the way of the cube, so left and right are alike.
        random_flip=1,
    ),
    "FoldCloth": dict(
        # An episode is one step, a whole fold of some 200 physics steps: about 8 come in a second.
        # That is slow, so each fold is used in four updates.
        total_steps=1_500, updates=4,
        seed_steps=150, explore_steps=150,
        feedback_every=150, pairs_per_session=30, max_pairs=300,
        discount=0.0,  # nothing comes after the one step
        sac_lr=1e-3, batch_size=128, hidden=128, reward_epochs=20,
        random_shift=0,
        # The start is fixed: ten best guesses would be one, ten drawn actions differ.
        eval_every=150, eval_episodes=10,
    ),
    "StraightenRope": dict(
        _ROPE_WATER,
        # A reward that is fitted anew moves every value by its own change / (1 - discount): a
        # hundredfold at .99, tenfold at .9. Straightening takes a few steps, so .9 sees far enough.
        discount=0.9,
        # No crumpled rope looks like another: more answers, more passes, and in a fit each image is
        # moved by up to a tenth of its 100 px.
        pairs_per_session=100, max_pairs=800, reward_epochs=40, random_shift=10,
    ),
    "PassWater": dict(
        _ROPE_WATER,
        # Water once spilled stays spilled: where the random actions change at every step, all that
        # is ever seen is wet ground. Held for an episode, most of them spill little. (Without it,
        # .62 of the way from random to expert, with one seed of an earlier schedule.)
        seed_steps=2_000, hold=75,
        # 320 pairs are asked in eight sessions; the limit of 500 is not reached.
        pairs_per_session=40, max_pairs=500,
        random_shift=0,
        # The discount stays .99: a short view is wrong for a cup that may spill later.
    ),
    # All of Meta-World's 50 tasks by their own names, MetaWorld/door-open-v3 and so on: what the three share, with the
    # steps of the longest of them. Measured on two of them, of which neither is learned to the end
    # (results/README.md).
    "MetaWorld": dict(
        _METAWORLD, total_steps=15_000, feedback_every=1_200, pairs_per_session=100, max_pairs=1_000,
        # The goal is elsewhere in every episode, so there is more to learn than in the three. For
        # learning rate and shift see support/adapt.py.
        reward_lr=1e-3, random_shift=8, reward_epochs=50,
    ),
    "DoorKey-5x5": _GRID,
    "DoorKey-6x6": _GRID,
    "DoorKey-8x8": _GRID,
    "Unlock": _GRID,
    "UnlockPickup": _GRID,
}

# ---- The paper's: the schedule of the official code, wherever ours has a number of its own ----
# max_pairs is their limit, not what is asked: sessions after the exploration times pairs a session
# make 5,000 pairs in CartPole, 9,920 in Meta-World, 11,800 with rope and water.
_PAPER = dict(
    seed_steps=1_000, explore_steps=10_000, hold=1, sampler="uniform",
    random_shift=0, random_flip=0, reward_batch=64, intercept=0,
    sac_lr=3e-4, batch_size=512, hidden=256, updates=1, discount=0.99, layer_norm=0, lr_at_end=1.0,
    # Their curves are means over seeds of one episode each; CartPole's are of ten.
    eval_every=10_000, eval_episodes=1, average_over=0.0,
)
_PAPER_METAWORLD = dict(
    _PAPER, total_steps=1_000_000,
    feedback_every=4_000, pairs_per_session=40, max_pairs=20_000,
    reward_lr=3e-4, reward_epochs=10, vlm_image_size=300, reward_image_size=300,
    # Episodes of 500 steps, each one of Meta-World's.
    horizon=500, action_repeat=1,
)
_PAPER_ROPE_WATER = dict(
    _PAPER, total_steps=600_000,
    feedback_every=5_000, pairs_per_session=100, max_pairs=12_000,
    reward_lr=1e-4, reward_epochs=30, vlm_image_size=720,
)
PAPER = {
    "CartPole": dict(
        _PAPER, total_steps=500_000, explore_steps=2_000,
        feedback_every=5_000, pairs_per_session=50, max_pairs=10_000,
        sac_lr=5e-4, batch_size=1024, hidden=1024,
        reward_lr=3e-4, reward_epochs=50, vlm_image_size=200, reward_image_size=200,
        eval_episodes=10,
    ),
    "DrawerOpen": _PAPER_METAWORLD,
    "Soccer": dict(_PAPER_METAWORLD, reward_lr=1e-4, reward_epochs=5),
    "SweepInto": _PAPER_METAWORLD,
    "FoldCloth": dict(
        _PAPER, total_steps=15_000, seed_steps=250, explore_steps=500, discount=0.0,
        feedback_every=1_000, pairs_per_session=50, max_pairs=500,
        sac_lr=5e-4, batch_size=1024, hidden=1024,
        reward_lr=3e-4, reward_epochs=25, vlm_image_size=360, reward_image_size=360,
        eval_every=250,
    ),
    # The reward network sees every third and every second pixel of the VLM's 720.
    "StraightenRope": dict(_PAPER_ROPE_WATER, reward_image_size=240),
    "PassWater": dict(_PAPER_ROPE_WATER, reward_image_size=360),
    # The grids are VLM-CaR's, and its paper gives no schedule.
}
