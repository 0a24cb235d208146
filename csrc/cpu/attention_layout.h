// Owns the tables that AttentionLayout (attention.h) points to.
#pragma once

#include <array>
#include <vector>

#include "../mask.h"
#include "attention.h"

namespace dalle_fast {

class AttentionLayoutStorage {
public:
    // The tiles that the first seq_len positions of the mask touch, found by evaluating its rule.
    AttentionLayoutStorage(const Mask& mask, int32_t seq_len);

    AttentionLayout view() const;

private:
    void join_units();

    struct Bits { GroupBits rows; };

    int32_t seq_len_, num_text_blocks_, num_text_panels_, image_window_ = 1, group_window_ = 1;
    int64_t num_tiles_ = 0;
    std::vector<int32_t> query_token_, key_token_, block_visits_, panel_visits_;
    std::vector<Visit> panels_of_block_, blocks_of_panel_;
    std::vector<std::array<uint16_t, kBlock>> bits_;
    std::vector<int32_t> unit_block_, unit_visits_;
    std::vector<GroupVisit> groups_of_unit_;
    std::vector<Bits> group_bits_;
};

}  // namespace dalle_fast
