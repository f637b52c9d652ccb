package daemon

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/dockerapi"
)

// listenDebug opens the socket of the debug endpoint, for this process's user
// alone: a heap profile shows what passes through the process.
func listenDebug(addr string) (net.Listener, error) {
	if !strings.HasPrefix(addr, "unix://") {
		return nil, fmt.Errorf("cannot serve debugging at %q: write unix:///path", addr)
	}
	return dockerapi.Listen(addr, dockerapi.ListenOptions{})
}

// Memory is what GET /debug/memory answers, taken after a full collection.
type Memory struct {
	Goroutines  int
	HeapBytes   uint64
	HeapObjects uint64
	StackBytes  uint64
}

// debugHandler serves the runtime's profiles as go tool pprof asks for them.
func debugHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/memory", func(w http.ResponseWriter, _ *http.Request) {
		debug.FreeOSMemory()
		var ms runtime.MemStats
		runtime.ReadMemStats(&ms)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(Memory{Goroutines: runtime.NumGoroutine(), HeapBytes: ms.HeapAlloc, HeapObjects: ms.HeapObjects, StackBytes: ms.StackInuse})
	})
	mux.HandleFunc("GET /debug/pprof/profile", func(w http.ResponseWriter, r *http.Request) {
		seconds, err := strconv.Atoi(r.FormValue("seconds"))
		if err != nil || seconds <= 0 || seconds > 600 {
			seconds = 30
		}
		if err := pprof.StartCPUProfile(w); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		defer pprof.StopCPUProfile()
		select {
		case <-time.After(time.Duration(seconds) * time.Second):
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("GET /debug/pprof/{name}", func(w http.ResponseWriter, r *http.Request) {
		p := pprof.Lookup(r.PathValue("name"))
		if p == nil {
			http.Error(w, "no such profile", http.StatusNotFound)
			return
		}
		if r.FormValue("gc") != "" {
			runtime.GC()
		}
		level, _ := strconv.Atoi(r.FormValue("debug"))
		_ = p.WriteTo(w, level)
	})
	return mux
}
