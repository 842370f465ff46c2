-- wrk: POSTs that differ in a number near their beginning. Arguments: path, file of the body with "00000000" in it.
local before, after, sent, threads = "", "", 0, 0

function setup(thread)
   thread:set("first", threads * 10000000)
   threads = threads + 1
end

function init(arguments)
   local file = assert(io.open(arguments[2], "rb"))
   local body = file:read("*a")
   file:close()
   wrk.method, wrk.path, wrk.headers["Content-Type"], wrk.body = "POST", arguments[1], "application/json", body
   local whole = wrk.format()
   local at = whole:find("00000000", 1, true)
   before, after, sent = whole:sub(1, at - 1), whole:sub(at + 8), first
end

function request()
   sent = sent + 1
   return before .. string.format("%08d", sent) .. after
end

function done(summary, latency)
   local errors = summary.errors
   io.stderr:write(string.format(
      '{"requests": %d, "seconds": %.6f, "p50_us": %.1f, "p99_us": %.1f, "mean_us": %.1f, "failed": %d}\n',
      summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99), latency.mean,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
