-- Put before every script of the store. A script sees one session's keys, which share a hash slot.
-- ARGV[1] is always the keys' life in milliseconds.
local STATE, PROMPT, TOKENS, SPECULATION, LOGPROBS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local TOKEN_BYTES = 4

local function now_ms()
  local time = redis.call('TIME')
  return string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
end

local function refresh()
  redis.call('PEXPIRE', STATE, ARGV[1])
  redis.call('PEXPIRE', PROMPT, ARGV[1])
  redis.call('PEXPIRE', TOKENS, ARGV[1])
  redis.call('PEXPIRE', SPECULATION, ARGV[1])
  redis.call('PEXPIRE', LOGPROBS, ARGV[1])
end

local function record()
  return redis.call('HGETALL', STATE)
end
