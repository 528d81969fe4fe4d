"""Inside one DP rank: scheduler, KV blocks, model runner, attention, experts, sampler."""
