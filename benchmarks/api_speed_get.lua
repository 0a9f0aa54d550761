-- For wrk: GET of jobs drawn at random. Arguments: a file of paths, one a line.
local requests = {}

function init(arguments)
  math.randomseed(1)
  for path in io.lines(arguments[1]) do
    requests[#requests + 1] = wrk.format("GET", path)
  end
end

function request()
  return requests[math.random(#requests)]
end

-- The outcome as a line of JSON; times in milliseconds.
function done(summary, latency)
  local errors = summary.errors
  local lost = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format(
    'OUTCOME {"requests": %d, "seconds": %.4f, "median": %.3f, "p99": %.3f, "refused": %d, "lost": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    errors.status, lost))
end
