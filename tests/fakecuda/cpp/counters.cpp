// What tests ask of the simulated machine, and what they change.
#include <sstream>

#include "machine.h"

using namespace fakecuda;

namespace {

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        out += c;
    }
    return out + "\"";
}

template <class Key, class Number>
std::string object(const std::map<Key, Number>& values) {
    std::ostringstream out;
    const char* comma = "";
    for (auto& [key, value] : values) {
        std::ostringstream name;
        name << key;
        out << comma << quoted(name.str()) << ": " << value;
        comma = ", ";
    }
    return "{" + out.str() + "}";
}

}  // namespace

extern "C" {

// All counters as a JSON object; valid until the next call of the same thread.
const char* fakecuda_counters() {
    static thread_local std::string text;
    std::lock_guard guard(machine().lock);
    const Counters& counters = machine().counters;
    std::ostringstream out;
    out << "{\"launches\": " << object(counters.launches) << ", \"host_waits\": " << object(counters.host_waits)
        << ", \"graph_launches\": " << counters.graph_launches << ", \"graph_kernels\": " << counters.graph_kernels
        << ", \"copied\": " << object(counters.copied) << ", \"contexts\": " << object(counters.contexts)
        << ", \"device_used\": " << object(machine().device_used) << ", \"pinned\": " << machine().pinned_memory.total()
        << ", \"registrations\": " << counters.registrations << ", \"live_events\": " << counters.live_events
        << ", \"most_events\": " << counters.most_events
        << ", \"overwritten_uploads\": " << counters.overwritten_uploads
        << ", \"unordered_copies\": " << counters.unordered_copies
        << ", \"released_in_flight\": " << counters.released_in_flight << "}";
    text = out.str();
    return text.c_str();
}

// From here on counts begin at zero; what is alive stays counted.
void fakecuda_reset_counters() {
    std::lock_guard guard(machine().lock);
    Counters fresh;
    fresh.live_events = fresh.most_events = machine().counters.live_events;
    machine().counters = fresh;
}

// The kernel after `launches` more fails, and every call after it; -1 heals the device.
void fakecuda_fail_after(long launches) {
    std::lock_guard guard(machine().lock);
    settings().fail_after_launches = launches < 0 ? -1 : machine().launched() + launches;
}

void fakecuda_refuse_capture(int refuse) {
    settings().capture_fails = refuse;
}

void fakecuda_refuse_registration(int refuse) {
    settings().registration_fails = refuse;
}

}  // extern "C"
