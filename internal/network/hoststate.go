package network

import (
	"encoding/json"
	"os"
	"path/filepath"
	"sync"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
)

// hostState remembers the kernel settings that we changed, so that Destroy
// can put them back. They die with the kernel, and so does the record.
type hostState struct {
	dir  string
	name string

	mu     sync.Mutex
	Before map[string]string // sysctl path to its former value
	done4  bool
	done6  bool
}

func newHostState(dir, tag string) *hostState {
	h := &hostState{dir: dir, name: "sysctl-" + tag + ".json", Before: map[string]string{}}
	if b, err := os.ReadFile(filepath.Join(dir, h.name)); err == nil {
		_ = json.Unmarshal(b, &h.Before)
		if h.Before == nil {
			h.Before = map[string]string{}
		}
	}
	return h
}

// set changes a setting and remembers what it was.
func (h *hostState) set(path, value string) error {
	old, err := bridge.Sysctl(path)
	if err != nil {
		return err
	}
	if old == value {
		return nil
	}
	if _, known := h.Before[path]; !known {
		// Remember first: killed in between, we would not know.
		h.Before[path] = old
		if err := writeRecord(h.dir, h.name, h.Before, durable.Nothing); err != nil {
			delete(h.Before, path)
			return err
		}
	}
	return bridge.SetSysctl(path, value)
}

// forward turns forwarding on where a network needs it.
func (h *hostState) forward(four, six bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if four && !h.done4 {
		if err := h.set("net/ipv4/ip_forward", "1"); err != nil {
			return err
		}
		h.done4 = true
	}
	if six && !h.done6 {
		if err := h.forward6(); err != nil {
			return err
		}
		h.done6 = true
	}
	return nil
}

// forward6 turns IPv6 forwarding on. A forwarding host stops listening to
// router advertisements unless told otherwise, and would lose its own default
// route; so links that listen are told.
func (h *hostState) forward6() error {
	const all = "net/ipv6/conf/all/forwarding"
	if v, err := bridge.Sysctl(all); err == nil && v == "1" {
		return nil
	}
	es, err := os.ReadDir("/proc/sys/net/ipv6/conf")
	if err != nil {
		return err
	}
	for _, e := range es {
		if e.Name() == "all" || e.Name() == "lo" {
			continue
		}
		p := "net/ipv6/conf/" + e.Name() + "/accept_ra"
		if v, err := bridge.Sysctl(p); err == nil && v == "1" {
			_ = h.set(p, "2") // the link may go at any time
		}
	}
	return h.set(all, "1")
}

// restore puts every setting back.
func (h *hostState) restore() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for p, v := range h.Before {
		_ = bridge.SetSysctl(p, v) // of a link that went: nothing to restore
	}
	h.Before, h.done4, h.done6 = map[string]string{}, false, false
	return h.forget()
}

// forget drops the record and leaves the settings.
func (h *hostState) forget() error { return removeRecord(h.dir, h.name, false) }
