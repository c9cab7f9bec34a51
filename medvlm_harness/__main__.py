"""`python -m medvlm_harness`: the `medvlm` command, for `torchrun -m` and `accelerate launch -m`."""

from medvlm_harness.cli import main

if __name__ == "__main__":
    main()
