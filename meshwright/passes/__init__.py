"""From a captured model to the lowered program: rules, types, conversions, stages, schedule, proofs."""
