-- Takes from, settles and seeds the accounts of server/policy/shared_ledger.py; one call is one atomic step.
-- KEYS[i] is the hash of an account, and run(KEYS[i]) the leases of what runs on it.
-- Time is this server's own, one clock for every replica; a test may pass another.

local verb = ARGV[1]
local now = tonumber(ARGV[2])
if now < 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end
local KEEP_S = 40 * 86400

-- A clock that is set back by a moment must not open the last minute, day or month anew; one that was wrong by more is
-- believed again.
local CLOCK, MAX_BACK_S = 'strongroom:limits-clock', 60
local latest = tonumber(redis.call('GET', CLOCK) or '0')
if now < latest and latest - now <= MAX_BACK_S then
  now = latest
else
  redis.call('SET', CLOCK, now)
end

-- What a replica read here when it last told us the store's totals; another one means that we were emptied since.
local EPOCH = 'strongroom:limits-epoch'

-- A prefix, not a suffix: names may hold a colon, and nobody may be called like another's leases.
local function run(key) return 'strongroom:running:' .. key end
-- A lease that ran out holds no place, but what was taken under it can still be settled for this long.
local LATE_S = 3600

local minute = math.floor(now / 60)
local day = math.floor(now / 86400)

-- Civil month of a day count, and the day on which the next month begins (Hinnant, days from civil, both ways).
local function civil(days)
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return year, month
end

local function first_day(year, month)
  local y = month <= 2 and year - 1 or year
  local era = math.floor(y / 400)
  local yoe = y - era * 400
  local mp = month > 2 and month - 3 or month + 9
  local doy = math.floor((153 * mp + 2) / 5)
  return era * 146097 + yoe * 365 + math.floor(yoe / 4) - math.floor(yoe / 100) + doy - 719468
end

local year, month_of_year = civil(day)
local month = year * 12 + month_of_year
local month_ends = first_day(month_of_year == 12 and year + 1 or year, month_of_year % 12 + 1) * 86400

-- Reads an account and moves its windows on to now. Fields: m minute, rc rp requests, tc tp tokens (current, previous),
-- d day, td tokens, cd cost, mo month, cm cost.
local function open(key)
  local found = redis.call('HMGET', key, 'm', 'rc', 'rp', 'tc', 'tp', 'd', 'td', 'cd', 'mo', 'cm')
  local a = {}
  for i, name in ipairs({'m', 'rc', 'rp', 'tc', 'tp', 'd', 'td', 'cd', 'mo', 'cm'}) do
    a[name] = tonumber(found[i] or '0') or 0
  end
  if a.m ~= minute then
    local follows = a.m == minute - 1
    a.rp = follows and a.rc or 0
    a.tp = follows and a.tc or 0
    a.rc, a.tc, a.m = 0, 0, minute
  end
  if a.d ~= day then a.d, a.td, a.cd = day, 0, 0 end
  if a.mo ~= month then a.mo, a.cm = month, 0 end
  return a
end

local function close(key, a)
  redis.call('HSET', key, 'm', a.m, 'rc', a.rc, 'rp', a.rp, 'tc', a.tc, 'tp', a.tp, 'd', a.d, 'td', a.td, 'cd', a.cd,
    'mo', a.mo, 'cm', a.cm)
  redis.call('EXPIRE', key, KEEP_S)
end

local part = (now - minute * 60) / 60
local function used(current, previous) return previous * (1 - part) + current end

-- Seconds until num more fit under limit, if nothing else comes; -1 if they never do.
local function wait(current, previous, num, limit)
  if num > limit then return -1 end
  if current + num <= limit then
    return math.max(0.001, (1 - (limit - num - current) / previous - part) * 60)
  end
  return math.max(0.001, (2 - (limit - num) / current - part) * 60)
end

-- Seconds until a budget's next period; -1 where not even a whole one holds num.
local function upto(ends, num, limit)
  if num > limit then return -1 end
  return ends
end

if verb == 'take' then
  local tokens, cost, lease, ttl = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])
  local requests, instead, epoch = tonumber(ARGV[7]), ARGV[8], ARGV[9]
  if epoch ~= '' and redis.call('GET', EPOCH) ~= epoch then return {-1} end
  local accounts = {}
  local worst, worst_kind, worst_wait = 0, '', 0
  local function short(i, kind, seconds)
    local longer = seconds < 0 or (worst_wait >= 0 and seconds > worst_wait)
    if worst == 0 or longer then worst, worst_kind, worst_wait = i, kind, seconds end
  end
  for i, key in ipairs(KEYS) do
    local a = open(key)
    accounts[i] = a
    local at = 9 + (i - 1) * 6
    local rpm, tpm, running, tpd = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
    local cpd, cpm = tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])
    if rpm >= 0 and used(a.rc, a.rp) + requests > rpm then
      short(i, 'requests', wait(a.rc, a.rp, requests, rpm))
    elseif tpm >= 0 and used(a.tc, a.tp) + tokens > tpm then
      short(i, 'tokens', wait(a.tc, a.tp, tokens, tpm))
    elseif tpd >= 0 and a.td + tokens > tpd then
      short(i, 'tokens_day', upto(86400 - now % 86400, tokens, tpd))
    elseif cpd >= 0 and a.cd + cost > cpd then
      short(i, 'cost_day', upto(86400 - now % 86400, cost, cpd))
    elseif cpm >= 0 and a.cm + cost > cpm then
      short(i, 'cost_month', upto(month_ends - now, cost, cpm))
    elseif running >= 0 then
      -- The leases of a replica that died end by themselves. Who comes in place of another needs no place beside it.
      local held = redis.call('ZCOUNT', run(key), now, '+inf')
      local score = instead ~= '' and redis.call('ZSCORE', run(key), instead)
      if score and tonumber(score) >= now then held = held - 1 end
      if held >= running then short(i, 'concurrent', 0) end
    end
  end
  if worst > 0 then return {0, worst, worst_kind, tostring(worst_wait)} end
  local answer = {1, minute, day, month}
  for i, key in ipairs(KEYS) do
    local a = accounts[i]
    a.rc, a.tc = a.rc + requests, a.tc + tokens
    a.td, a.cd, a.cm = a.td + tokens, a.cd + cost, a.cm + cost
    close(key, a)
    redis.call('ZREMRANGEBYSCORE', run(key), '-inf', now - LATE_S)
    redis.call('ZADD', run(key), now + ttl, lease)
    redis.call('EXPIRE', run(key), KEEP_S)
    answer[#answer + 1] = tostring(used(a.rc, a.rp))
    answer[#answer + 1] = tostring(used(a.tc, a.tp))
  end
  answer[#answer + 1] = tostring(now)
  return answer
end

if verb == 'settle' then
  local tokens, cost, lease = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
  local in_minute, in_day, in_month = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
  local num = 0
  for _, key in ipairs(KEYS) do
    -- Settled once: the lease says so. What is settled too late was counted in full, and stays so.
    if redis.call('ZREM', run(key), lease) == 1 then
      num = num + 1
      local a = open(key)
      if in_minute == a.m then
        a.tc = math.max(0, a.tc + tokens)
      elseif in_minute == a.m - 1 then
        a.tp = math.max(0, a.tp + tokens)
      end
      if in_day == a.d then a.td, a.cd = a.td + tokens, a.cd + cost end
      if in_month == a.mo then a.cm = a.cm + cost end
      close(key, a)
    end
  end
  return num
end

if verb == 'renew' then
  local ttl = tonumber(ARGV[3])
  for i, key in ipairs(KEYS) do
    redis.call('ZADD', run(key), 'XX', now + ttl, ARGV[3 + i])
  end
  return #KEYS
end

if verb == 'seed' then
  -- Never less than the store knows; what is there counts requests that still run, too.
  for i, key in ipairs(KEYS) do
    local a, at = open(key), 3 * i
    a.td = math.max(a.td, tonumber(ARGV[at]))
    a.cd = math.max(a.cd, tonumber(ARGV[at + 1]))
    a.cm = math.max(a.cm, tonumber(ARGV[at + 2]))
    close(key, a)
  end
  return #KEYS
end

if verb == 'epoch' then
  redis.call('SET', EPOCH, ARGV[3], 'NX')
  return {redis.call('GET', EPOCH)}
end

return redis.error_reply('unknown verb')
