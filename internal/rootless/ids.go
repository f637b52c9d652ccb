package rootless

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// idRange maps size ids from inside on to outside on.
type idRange struct{ inside, outside, size int }

// mappings tells which ids the user namespace gets: the user as root, then the
// user's subordinate ids from 1 on. Without those only root can be mapped.
func mappings(u *user.User, warn func(string)) (uids, gids []idRange, err error) {
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	if err1 != nil || err2 != nil {
		return nil, nil, fault.New(fault.Unsupported, "cannot run rootless: user id %q is not a number", u.Uid)
	}
	uids, gids = []idRange{{0, uid, 1}}, []idRange{{0, gid, 1}}
	subuids, err := subordinate("/etc/subuid", u)
	if err != nil {
		return nil, nil, err
	}
	subgids, err := subordinate("/etc/subgid", u)
	if err != nil {
		return nil, nil, err
	}
	if len(subuids) == 0 || len(subgids) == 0 {
		warn(fmt.Sprintf("user %s has no subordinate ids: only root exists in containers, and images with other users will not unpack (usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s)", u.Username, u.Username))
		return uids, gids, nil
	}
	return append(uids, pack(subuids)...), append(gids, pack(subgids)...), nil
}

// pack lays ranges one after another inside, from id 1 on.
func pack(subs []idRange) []idRange {
	next := 1
	for i := range subs {
		subs[i].inside = next
		next += subs[i].size
	}
	return subs
}

// subordinate reads the ranges of a user, by name or number, out of /etc/subuid
// or /etc/subgid (lines of name:start:count).
func subordinate(path string, u *user.User) ([]idRange, error) {
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read subordinate ids: %w", err)
	}
	return parseSubordinate(string(data), u.Username, u.Uid), nil
}

func parseSubordinate(text, name, uid string) (out []idRange) {
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) != 3 || (f[0] != name && f[0] != uid) {
			continue
		}
		start, err1 := strconv.ParseUint(f[1], 10, 31)
		size, err2 := strconv.ParseUint(f[2], 10, 31)
		if err1 == nil && err2 == nil && size > 0 {
			out = append(out, idRange{outside: int(start), size: int(size)})
		}
	}
	return out
}

// mapIDs writes the maps of a process in a new user namespace: alone for one id
// each, else with the set-uid programs that check subordinate ids.
func mapIDs(pid int, uids, gids []idRange) error {
	if len(uids) == 1 && len(gids) == 1 {
		dir := fmt.Sprintf("/proc/%d/", pid)
		// The kernel wants setgroups given up before an unprivileged gid map.
		if err := os.WriteFile(dir+"setgroups", []byte("deny"), 0); err != nil {
			return fmt.Errorf("cannot map ids: %w", err)
		}
		for file, r := range map[string]idRange{"uid_map": uids[0], "gid_map": gids[0]} {
			if err := os.WriteFile(dir+file, fmt.Appendf(nil, "%d %d %d\n", r.inside, r.outside, r.size), 0); err != nil {
				return fmt.Errorf("cannot map ids: %w", err)
			}
		}
		return nil
	}
	for tool, ranges := range map[string][]idRange{"newuidmap": uids, "newgidmap": gids} {
		args := []string{strconv.Itoa(pid)}
		for _, r := range ranges {
			args = append(args, strconv.Itoa(r.inside), strconv.Itoa(r.outside), strconv.Itoa(r.size))
		}
		path, err := exec.LookPath(tool)
		if err != nil {
			return fault.New(fault.Unsupported, "cannot map subordinate ids: %s is not installed (Debian package: uidmap)", tool)
		}
		if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
			return fault.New(fault.Unsupported, "cannot map subordinate ids: %s: %s", tool, strings.TrimSpace(string(out)))
		}
	}
	return nil
}
