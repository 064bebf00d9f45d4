"""GPT-NeoX's arguments by the class that declares them: name, type, default.

A literal type is written `choice`. The two names that a class declares twice are listed once.

Source  gpt-neox megatron/neox_arguments/{neox_args,deepspeed_args}.py at ea7aefd8.
"""

GROUPS: dict[str, str] = {
    "NeoXArgsParallelism": """
        pipe_parallel_size int 0
        model_parallel_size int 1
        pipe_partition_method str type:transformer|mlp
        world_size int None
        is_pipe_parallel bool False
        sequence_parallel bool False
    """,
    "NeoXArgsModel": """
        precision choice None
        num_layers int None
        hidden_size int None
        intermediate_size int None
        mlp_multiple_of int 1
        expansion_factor float None
        num_attention_heads int None
        num_kv_heads int None
        seq_length int None
        sliding_window_width int None
        max_position_embeddings int None
        norm choice layernorm
        layernorm_fusion bool False
        rmsnorm_fusion bool False
        use_qk_layernorm bool False
        layernorm_epsilon float 1e-05
        rms_norm_epsilon float 1e-08
        scalenorm_epsilon float 1e-08
        pos_emb choice learned
        rpe_num_buckets int 32
        rpe_max_distance int 128
        opt_pos_emb_offset int 0
        no_weight_tying bool False
        attention_config list None
        sparsity_config dict None
        num_unique_layers int None
        param_sharing_style str grouped
        make_vocab_size_divisible_by int 128
        activation choice gelu
        use_flashattn_swiglu bool False
        scaled_upper_triang_masked_softmax_fusion bool False
        scaled_masked_softmax_fusion bool False
        bias_gelu_fusion bool False
        bias_dropout_fusion bool False
        rope_fusion bool False
        fused_kernels_build_path str None
        fp16_lm_cross_entropy bool False
        init_method_std float 0.02
        apply_query_key_layer_scaling bool False
        use_cpu_initialization bool False
        attention_softmax_in_fp32 bool False
        rotary_pct float 1.0
        rotary_emb_base int 10000
        rotary_save_freqs_buffer bool False
        init_method choice normal
        output_layer_init_method choice scaled_normal
        gmlp_attn_dim int 64
        gpt_j_residual bool False
        gpt_j_tied bool False
        use_bias_in_norms bool True
        use_bias_in_attn_linear bool True
        use_bias_in_mlp bool True
        soft_prompt_tuning dict None
        mamba_selective_scan_fusion bool False
        mamba_causal_conv_fusion bool False
        mamba_inner_func_fusion bool False
        mamba_selective_fp32_params bool True
        mamba_use_bias_in_conv bool True
        mamba_use_bias_in_linears bool False
        output_layer_parallelism choice column
        serve_model_weights bool False
        weight_server_port int|list 6000
        online_dataserver_ips str|list localhost
        online_dataserver_ports int|list 10000
        te_columnparallel bool False
        te_rowparallel bool False
        te_layernorm_mlp bool False
        te_mha bool False
        te_fp8_format choice hybrid
        te_fp8_wgrad bool True
        te_fp8_amax_history_len int 1
        te_fp8_amax_compute_algo str most_recent
        te_fp8_margin int 0
        te_fp8_mha bool False
        dim_att int None
        head_size int None
        ffn_dim int None
    """,
    "NeoXArgsOptimizer": """
        optimizer_type choice adam
        use_bnb_optimizer bool False
        zero_stage int|list|str None
        zero_reduce_scatter bool None
        zero_contiguous_gradients bool None
        zero_reduce_bucket_size int None
        zero_allgather_bucket_size int None
        lr float None
    """,
    "NeoXArgsLRScheduler": """
        lr_decay_style choice linear
        lr_decay_iters int None
        lr_decay_fraction float None
        min_lr float 0.0
        warmup float 0.01
        override_lr_scheduler bool False
        use_checkpoint_lr_scheduler bool False
    """,
    "NeoXArgsLogging": """
        use_wandb bool None
        wandb_group str None
        wandb_run_name str None
        wandb_team str None
        wandb_project str neox
        wandb_host str https://api.wandb.ai
        wandb_init_all_ranks bool False
        git_hash str (the commit)
        log_dir str None
        tensorboard_dir str None
        use_comet bool None
        comet_workspace str None
        comet_project str None
        comet_experiment_name str None
        comet_tags list None
        comet_others dict None
        comet_experiment Any None
        peak_theoretical_tflops float None
        log_interval int 100
        log_grad_pct_zeros bool False
        log_param_norm bool False
        log_grad_norm bool False
        log_optimizer_states bool False
        log_gradient_noise_scale bool False
        gradient_noise_scale_n_batches int 5
        gradient_noise_scale_cpu_offload bool False
        memory_profiling bool False
        memory_profiling_path str None
        profile bool False
        profile_step_start int 10
        profile_step_stop int 12
    """,
    "NeoXArgsOther": """
        distributed_backend str nccl
        local_rank int None
        rank int None
        lazy_mpu_init bool False
        short_seq_prob float 0.1
        eod_mask_loss bool False
        adlr_autoresume bool False
        adlr_autoresume_interval int 1000
        seed int 1234
        onnx_safe bool False
        deepscale bool False
        deepscale_config str None
        deepspeed_mpi bool False
        deepspeed_slurm bool False
        user_script str None
        iteration int None
        do_train bool None
        do_valid bool None
        do_test bool None
        global_num_gpus int None
    """,
    "NeoXArgsTokenizer": """
        tokenizer_type choice GPT2BPETokenizer
        padded_vocab_size int None
    """,
    "NeoXArgsTraining": """
        data_path str None
        use_shared_fs bool True
        train_data_paths list None
        train_label_data_paths list None
        train_reward_data_paths list None
        test_data_paths list None
        test_label_data_paths list None
        test_reward_data_paths list None
        valid_data_paths list None
        valid_label_data_paths list None
        valid_reward_data_paths list None
        pos_train_data_paths list None
        neg_train_data_paths list None
        pos_train_label_data_paths list None
        neg_train_label_data_paths list None
        pos_valid_data_paths list None
        neg_valid_data_paths list None
        pos_valid_label_data_paths list None
        neg_valid_label_data_paths list None
        pos_test_data_paths list None
        neg_test_data_paths list None
        pos_test_label_data_paths list None
        neg_test_label_data_paths list None
        train_data_weights list None
        valid_data_weights list None
        test_data_weights list None
        weight_by_num_documents bool False
        weighted_sampler_alpha float 1.0
        data_impl choice infer
        pack_impl choice packed
        dataset_impl choice gpt2
        train_impl choice normal
        dpo_fp32 bool True
        dpo_reference_free bool False
        dpo_beta float 0.1
        kto_fp32 bool True
        kto_desirable_weight float 1.0
        kto_undesirable_weight float 1.0
        z_loss float 0.0
        kto_beta float 0.1
        fp32_reinforce bool True
        kl_impl choice mse
        kl_div_beta float 0.1
        reinforce_leave_one_out bool False
        allow_chopped bool True
        mmap_warmup bool False
        save str None
        s3_path str None
        s3_chunk_size int 104857600
        config_files dict None
        load str None
        checkpoint_validation_with_forward_pass bool False
        checkpoint_scale choice linear
        checkpoint_factor int|float None
        extra_save_iters list None
        no_save_optim bool False
        no_save_rng bool False
        no_load_optim bool False
        no_load_rng bool False
        finetune bool False
        batch_size int None
        train_iters int None
        train_epochs int None
        eval_iters int 100
        keep_last_n_checkpoints int None
        eval_interval int 1000
        split str 969, 30, 1
        vocab_file str None
        merge_file str None
        num_workers int 2
        exit_interval int None
        attention_dropout float 0.0
        hidden_dropout float 0.0
        weight_decay float 0.1
        checkpoint_activations bool False
        checkpoint_num_layers int 1
        deepspeed_activation_checkpointing bool True
        contiguous_checkpointing bool False
        checkpoint_in_cpu bool False
        synchronize_each_layer bool False
        profile_backward bool False
        partition_activations bool False
        clip_grad float 1.0
        hysteresis int 2
        dynamic_loss_scale bool None
        loss_scale float None
        loss_scale_window float 1000.0
        min_scale float 1.0
        char_level_ppl bool False
        use_mup bool False
        coord_check bool False
        save_base_shapes bool False
        base_shapes_file str None
        mup_init_scale float 1.0
        mup_attn_temp float 1.0
        mup_output_temp float 1.0
        mup_embedding_mult float 1.0
        mup_rp_embedding_mult float 1.0
        mup_width_scale int 2
    """,
    "NeoXArgsTextgen": """
        text_gen_type str None
        precompute_model_name str None
        temperature float 0.0
        top_p float 0.0
        top_k int 0
        return_logits bool False
        maximum_tokens int 64
        prompt_end str \\n
        sample_input_file str None
        sample_output_file str samples.txt
        num_samples int 1
        recompute bool False
        eval_results_prefix str ''
        eval_tasks list None
    """,
    "NeoXArgsMoE": """
        moe_num_experts int 1
        moe_expert_interval int 1
        moe_top_k int 1
        moe_router_type choice sinkhorn
        moe_lbl_in_fp32 bool False
        moe_jitter_eps float None
    """,
    "NeoXArgsDeepspeedConfig": """
        deepspeed bool True
        train_batch_size int None
        train_micro_batch_size_per_gpu int None
        gradient_accumulation_steps int 1
        optimizer dict None
        scheduler dict None
        fp32_allreduce bool False
        prescale_gradients bool False
        gradient_predivide_factor float 1.0
        sparse_gradients bool False
        fp16 dict None
        bf16 dict None
        amp dict None
        gradient_clipping float 1.0
        zero_optimization dict None
        curriculum_learning dict None
        curriculum_seqlen int 0
        steps_per_print int 10
        wall_clock_breakdown bool False
        dump_state bool False
        flops_profiler dict None
        communication_data_type bool None
        autotuning dict None
        activation_checkpointing dict None
        sparse_attention dict None
        data_efficiency dict None
        tensorboard dict None
        wandb dict None
        csv_monitor dict None
        elasticity dict None
        comms_logger dict None
        compression_training dict None
        checkpoint dict None
        data_types dict None
        deepspeed_extra_args dict None
    """,
    "NeoXArgsDeepspeedRunner": """
        hostfile str None
        include str None
        exclude str None
        num_nodes int -1
        num_gpus int None
        master_port int 29500
        master_addr str None
        launcher choice pdsh
        force_multi bool False
        autotuning_run str None
        no_ssh_check bool False
        comment str None
        account str None
    """,
}
"""Class -> a line for each of its arguments. None: the argument is not set."""

OLDER: dict[str, str] = {
    "Earlier versions": """
        gas autotuning_config save_interval save_iters detect_nvlink_pairs
        zero_allow_untested_optimizer""",
    "Experts before June 2025": """
        moe_type expert_interval moe_expert_parallel_size enable_expert_tensor_parallelism
        moe_loss_coeff moe_token_dropping moe_train_capacity_factor moe_eval_capacity_factor
        moe_min_capacity moe_use_residual moe_glu create_moe_param_group use_tutel""",
    "Published files, which GPT-NeoX itself refuses": """
        attention_type decay_lr_to warmup_iters eval_num_fewshot""",
    "The fork online-data-mixing": """
        data_sampling_method data_sampling_warmup_steps data_sampling_update_frequency
        data_sampling_smoothing_factor mixed_batches mixed_minibatches validation_based_reward
        batch_normalized_reward scale_by_reward_loss_diff use_named_train_datasets
        use_named_eval_datasets max_validation_samples_per_dataset max_test_samples_per_dataset""",
}
"""Where other names come from -> the names. Files with them are read too."""
