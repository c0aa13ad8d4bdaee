-- Counts a request in every window that has a limit or, if a window is full, in none. KEYS[1]: counters of a key.
-- ARGV: its limits per minute, hour and day, -1 for none. Returns whether the request is counted, and for each limit
-- the current count and the milliseconds until the next window. If the clock was set back by less than a window,
-- counting continues in the later window.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local names, lengths = { 'm', 'h', 'd' }, { 60000, 3600000, 86400000 }
local stored = redis.pcall('HMGET', KEYS[1], 'mw', 'mc', 'hw', 'hc', 'dw', 'dc')
if stored.err then
    redis.call('DEL', KEYS[1])
    stored = {}
end
local answer, windows, counts, allowed, life = { 1 }, {}, {}, 1, 0
for i = 1, 3 do
    local limit = tonumber(ARGV[i])
    if limit >= 0 then
        local window = math.floor(now / lengths[i])
        local kept, count = tonumber(stored[2 * i - 1] or nil), 0
        if kept and (kept == window or kept == window + 1) then
            window, count = kept, tonumber(stored[2 * i] or nil) or 0
        end
        if count >= limit then allowed = 0 end
        windows[i], counts[i] = window, count
    end
end
local write = { 'HSET', KEYS[1] }
for i = 1, 3 do
    if windows[i] then
        local left = (windows[i] + 1) * lengths[i] - now
        counts[i] = counts[i] + allowed
        answer[#answer + 1], answer[#answer + 2] = counts[i], left
        if left > life then life = left end
        for _, value in ipairs({ names[i] .. 'w', windows[i], names[i] .. 'c', counts[i] }) do
            write[#write + 1] = value
        end
    end
end
if allowed == 1 then
    redis.call(unpack(write))
    redis.call('PEXPIRE', KEYS[1], life)
end
answer[1] = allowed
return answer
