"""The command line: `grug train | plan | eval | harness | sample | plot | ckpt`."""
