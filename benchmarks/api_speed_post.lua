-- For wrk: jobs, each with an Idempotency-Key of its own. Arguments: a file with the body, in which @N@ stands for the
-- number of the job and @LENGTH@ for a length that is another one for each job; and a word that begins the keys.
local template, word
local number = 0

function init(arguments)
  local file = io.open(arguments[1])
  template = file:read("*a")
  file:close()
  word = arguments[2]
  wrk.headers["Content-Type"] = "application/json"
end

function request()
  number = number + 1
  local body = template:gsub("@N@", number):gsub("@LENGTH@", 512 + number % 15000)
  wrk.headers["Idempotency-Key"] = word .. "-" .. number
  return wrk.format("POST", "/jobs", nil, body)
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
