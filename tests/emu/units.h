// SPDX-License-Identifier: Apache-2.0
// units.h - what works beside the threads on Hopper: bulk copies with their mbarriers (bulk.cpp)
// and the tensor cores of warpgroups (warpgroup.cpp), as the scheduler sees them.
#pragma once

#include <string>

namespace emu {

void begin_bulk_units();
// Lets a copy or store that is under way arrive, if there is one.
bool land_something();
// "" or what a block that has ended has left behind.
std::string bulk_leftovers(int block_rank);
// For the report of a deadlock.
std::string mbarriers_in_words();

void begin_warpgroups();
std::string warpgroup_leftovers(int block_rank);

} // namespace emu
