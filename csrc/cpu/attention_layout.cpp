#include "attention_layout.h"

#include <algorithm>
#include <limits>
#include <map>

namespace dalle_fast {
namespace {

// Image positions below `length` in the order the kernels walk them: raster, but column by column for column attention,
// so that the keys of a query lie side by side (AttentionMask.token_order).
std::vector<int32_t> walk_order(const Mask& m, int32_t length) {
    std::vector<int32_t> order;
    order.reserve(length);
    if (m.rule == Rule::column) {
        for (int32_t column = 0; column < m.W; ++column)
            for (int32_t i = column; i < length; i += m.W) order.push_back(i);
    } else {
        for (int32_t i = 0; i < length; ++i) order.push_back(i);
    }
    return order;
}

// How many steps of the walk back a query's first key may lie: bounds the search for tiles, nothing more.
int64_t walk_reach(const Mask& m) {
    const int64_t h = int64_t(m.K / 2) * m.d;
    switch (m.rule) {
        case Rule::row: case Rule::axial_row: return m.W;
        case Rule::column: return m.H;
        case Rule::conv_flat: case Rule::conv_clip: return h * (m.W + 1);
        case Rule::conv_corner: return 2 * h * (m.W + 1);
        default: return int64_t(m.H) * m.W;
    }
}

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

void append_padded(std::vector<int32_t>& slots, int32_t offset, const std::vector<int32_t>& tokens, int32_t size) {
    for (int32_t token : tokens) slots.push_back(offset + token);
    while (slots.size() % size) slots.push_back(-1);
}

// Appends to the visits from `begin` on, joining runs of full tiles.
void append_visit(std::vector<Visit>& visits, size_t begin, int32_t index, int32_t bits) {
    if (bits < 0 && visits.size() > begin && visits.back().bits < 0 &&
        visits.back().first + visits.back().count == index)
        ++visits.back().count;
    else
        visits.push_back({index, 1, bits});
}

}  // namespace

AttentionLayoutStorage::AttentionLayoutStorage(const Mask& m, int32_t seq_len) : seq_len_(seq_len) {
    const int32_t text = std::min(seq_len, m.T), image = seq_len - text;
    std::vector<int32_t> text_tokens(text);
    for (int32_t i = 0; i < text; ++i) text_tokens[i] = i;
    const std::vector<int32_t> image_tokens = walk_order(m, image);
    num_text_blocks_ = ceil_div(text, kBlock);
    num_text_panels_ = ceil_div(text, kPanel);
    append_padded(query_token_, 0, text_tokens, kBlock);
    append_padded(query_token_, m.T, image_tokens, kBlock);
    append_padded(key_token_, 0, text_tokens, kPanel);
    append_padded(key_token_, m.T, image_tokens, kPanel);
    const int32_t num_blocks = int32_t(query_token_.size()) / kBlock, num_panels = int32_t(key_token_.size()) / kPanel;
    const int64_t reach = walk_reach(m);

    const auto visit_tile = [&](int32_t block, int32_t panel) {
        std::array<uint16_t, kBlock> rows{};
        bool full = true, any = false;
        for (int r = 0; r < kBlock; ++r) {
            const int32_t query = query_token_[block * kBlock + r];
            if (query < 0) {  // no query: like the row before, so that it never makes a full tile partial
                rows[r] = rows[r - 1];
                continue;
            }
            for (int k = 0; k < kPanel; ++k) {
                const int32_t key = key_token_[panel * kPanel + k];
                if (key >= 0 && allows(m, query, key)) rows[r] |= uint16_t(1u << k);
            }
            full = full && rows[r] == 0xffff;
            any = any || rows[r];
        }
        if (!any) return;
        if (!full) bits_.push_back(rows);
        append_visit(panels_of_block_, block_visits_.back(), panel, full ? -1 : int32_t(bits_.size()) - 1);
    };
    for (int32_t block = 0; block < num_blocks; ++block) {
        block_visits_.push_back(int32_t(panels_of_block_.size()));
        const bool is_text = block < num_text_blocks_;
        // Whole panels that every row sees need no evaluation: text before a text block, all text before an image
        // block, and under the causal rule the image before it.
        const int32_t text_full = is_text ? block * kBlock / kPanel : text / kPanel;
        for (int32_t panel = 0; panel < text_full; ++panel)
            append_visit(panels_of_block_, block_visits_.back(), panel, -1);
        const int32_t text_end = is_text ? ((block + 1) * kBlock - 1) / kPanel + 1 : num_text_panels_;
        for (int32_t panel = text_full; panel < std::min(text_end, num_text_panels_); ++panel) visit_tile(block, panel);
        if (is_text) continue;
        const int32_t first = (block - num_text_blocks_) * kBlock, last = std::min(first + kBlock, image) - 1;
        int32_t panel = int32_t(std::max<int64_t>(0, first - reach) / kPanel);
        if (m.rule == Rule::causal)
            for (; panel < first / kPanel; ++panel)
                append_visit(panels_of_block_, block_visits_.back(), num_text_panels_ + panel, -1);
        for (; panel <= last / kPanel; ++panel) visit_tile(block, num_text_panels_ + panel);
        const Visit& end = panels_of_block_.back();  // every query sees itself
        for (size_t x = size_t(block_visits_.back()); x < panels_of_block_.size(); ++x)
            if (const Visit& visit = panels_of_block_[x]; visit.first + visit.count > num_text_panels_) {
                const int32_t begin = std::max(visit.first, num_text_panels_);
                image_window_ = std::max(image_window_, end.first + end.count - begin);
                break;
            }
    }
    block_visits_.push_back(int32_t(panels_of_block_.size()));
    for (const Visit& visit : panels_of_block_) num_tiles_ += visit.count;

    std::vector<std::vector<Visit>> by_panel(num_panels);
    for (int32_t block = 0; block < num_blocks; ++block)
        for (int32_t x = block_visits_[block]; x < block_visits_[block + 1]; ++x) {
            const Visit& visit = panels_of_block_[x];
            for (int32_t panel = visit.first; panel < visit.first + visit.count; ++panel)
                append_visit(by_panel[panel], 0, block, visit.bits);
        }
    for (const auto& visits : by_panel) {
        panel_visits_.push_back(int32_t(blocks_of_panel_.size()));
        blocks_of_panel_.insert(blocks_of_panel_.end(), visits.begin(), visits.end());
    }
    panel_visits_.push_back(int32_t(blocks_of_panel_.size()));
    join_units();
}

// The blocks' visits, unit by unit and group by group.
void AttentionLayoutStorage::join_units() {
    const int32_t num_blocks = int32_t(block_visits_.size()) - 1;
    const int32_t num_text_groups = ceil_div(num_text_panels_, kGroupPanels);
    for (int32_t block = 0; block < num_blocks;) {
        const int32_t end = std::min(block + kUnitBlocks, block < num_text_blocks_ ? num_text_blocks_ : num_blocks);
        unit_block_.push_back(block);
        unit_visits_.push_back(int32_t(groups_of_unit_.size()));
        std::map<int32_t, Bits> groups;  // a map value begins with zeros
        for (int32_t row_block = 0; block < end; ++block, ++row_block)
            for (int32_t x = block_visits_[block]; x < block_visits_[block + 1]; ++x) {
                const Visit& visit = panels_of_block_[x];
                for (int32_t panel = visit.first; panel < visit.first + visit.count; ++panel) {
                    const bool text = panel < num_text_panels_;
                    const int32_t of_section = text ? panel : panel - num_text_panels_;
                    Bits& bits = groups[of_section / kGroupPanels + (text ? 0 : num_text_groups)];
                    uint16_t* rows = bits.rows[row_block / 2][of_section % kGroupPanels] + row_block % 2 * kBlock;
                    for (int r = 0; r < kBlock; ++r) rows[r] = visit.bits < 0 ? 0xffff : bits_[visit.bits][r];
                }
            }
        for (const auto& [group, bits] : groups) {
            const uint16_t* rows = &bits.rows[0][0][0];
            const uint16_t* end_of_rows = rows + sizeof(GroupBits) / sizeof(*rows);
            const bool full = std::all_of(rows, end_of_rows, [](uint16_t x) { return x == 0xffff; });
            if (!full) group_bits_.push_back(bits);
            groups_of_unit_.push_back({group, full ? -1 : int32_t(group_bits_.size()) - 1});
        }
    }
    unit_block_.push_back(num_blocks);
    unit_visits_.push_back(int32_t(groups_of_unit_.size()));

    int32_t first_still_needed = std::numeric_limits<int32_t>::max();
    for (size_t unit = unit_block_.size() - 1; unit-- > 0;)
        for (int32_t last = unit_visits_[unit + 1] - 1, x = last; x >= unit_visits_[unit]; --x) {
            const int32_t group = groups_of_unit_[x].group;
            if (group < num_text_groups) break;
            first_still_needed = std::min(first_still_needed, group);
            group_window_ = std::max(group_window_, groups_of_unit_[last].group - first_still_needed + 1);
        }
}

AttentionLayout AttentionLayoutStorage::view() const {
    AttentionLayout layout{};
    layout.seq_len = seq_len_;
    layout.num_text_blocks = num_text_blocks_;
    layout.num_blocks = int32_t(block_visits_.size()) - 1;
    layout.num_text_panels = num_text_panels_;
    layout.num_panels = int32_t(panel_visits_.size()) - 1;
    layout.image_window = image_window_;
    layout.num_tiles = num_tiles_;
    layout.query_token = query_token_.data();
    layout.key_token = key_token_.data();
    layout.block_visits = block_visits_.data();
    layout.panels_of_block = panels_of_block_.data();
    layout.panel_visits = panel_visits_.data();
    layout.blocks_of_panel = blocks_of_panel_.data();
    static_assert(sizeof(bits_[0]) == sizeof(uint16_t[kBlock]), "an array is its elements");
    layout.bits = reinterpret_cast<const uint16_t(*)[kBlock]>(bits_.data());
    layout.num_text_groups = ceil_div(num_text_panels_, kGroupPanels);
    layout.num_groups = layout.num_text_groups + ceil_div(layout.num_panels - num_text_panels_, kGroupPanels);
    layout.num_units = int32_t(unit_block_.size()) - 1;
    layout.group_window = group_window_;
    layout.unit_block = unit_block_.data();
    layout.unit_visits = unit_visits_.data();
    layout.groups_of_unit = groups_of_unit_.data();
    layout.group_bits = reinterpret_cast<const GroupBits*>(group_bits_.data());
    return layout;
}

}  // namespace dalle_fast
