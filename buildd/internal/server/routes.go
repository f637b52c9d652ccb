package server

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/client"
	"github.com/moby/moby/api/types/build"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"

	"github.com/cloudos-io/cloudos/internal/build/contract"
	"github.com/cloudos-io/cloudos/internal/durable"
)

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /grpc", s.serveGRPC)
	mux.HandleFunc("POST /session", s.serveSession)
	mux.HandleFunc("POST /build", s.classic.Build)
	mux.HandleFunc("POST /build/cancel", s.classic.Cancel)
	mux.HandleFunc("POST /build/prune", s.prune)
	mux.HandleFunc("GET /usage", s.usage)
	return traced(mux)
}

// upgrades are the routes of clients' connections that the engine hands over.
func (s *Server) upgrades() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /grpc", s.serveGRPC)
	mux.HandleFunc("POST /session", s.serveSession)
	return traced(mux)
}

// traced makes a request part of the trace that its headers name.
func traced(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := otel.GetTextMapPropagator().Extract(r.Context(), propagation.HeaderCarrier(r.Header))
		h.ServeHTTP(w, r.WithContext(ctx))
	})
}

func fail(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"message": err.Error()})
}

// serveGRPC turns the connection into one of BuildKit's control API.
func (s *Server) serveGRPC(w http.ResponseWriter, r *http.Request) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), "h2c") {
		fail(w, http.StatusBadRequest, errors.New("cannot speak gRPC: the request asks for no upgrade to h2c"))
		return
	}
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		fail(w, http.StatusInternalServerError, err)
		return
	}
	_ = conn.SetDeadline(time.Time{})
	if _, err := conn.Write([]byte("HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")); err != nil {
		_ = conn.Close()
		return
	}
	c := &bufferedConn{Conn: conn, r: buf.Reader, closed: make(chan struct{}), client: peerAddr{r.Header.Get(contract.CallerHeader), r.Header.Get(contract.ConfinedHeader)}}
	if err := s.hijacked.put(c); err != nil {
		_ = conn.Close()
		return
	}
	<-c.closed
}

// bufferedConn reads first what the HTTP server had read already.
type bufferedConn struct {
	net.Conn
	r      *bufio.Reader
	closed chan struct{}
	client peerAddr
}

// peerAddr is the address of a connection: who is there.
type peerAddr struct {
	// caller is the engine's name for him, confined why his steps may not have what is the
	// host's, or empty.
	caller, confined string
}

func (peerAddr) Network() string { return "caller" }
func (peerAddr) String() string  { return "caller" }

func (c *bufferedConn) RemoteAddr() net.Addr { return c.client }

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

func (c *bufferedConn) Close() error {
	select {
	case <-c.closed:
	default:
		close(c.closed)
	}
	return c.Conn.Close()
}

// sessionHeader names a session, in requests and in gRPC's metadata.
const sessionHeader = "X-Docker-Expose-Session-Uuid"

func (s *Server) serveSession(w http.ResponseWriter, r *http.Request) {
	defer s.callers.Set(r.Header.Get(sessionHeader), r.Header.Get(contract.CallerHeader))()
	if err := s.sessions.HandleHTTPRequest(r.Context(), w, r); err != nil && r.Context().Err() == nil {
		s.log.Debug("a session ended", "cause", err)
		fail(w, http.StatusBadRequest, err)
	}
}

// collect brings the cache within its budget.
func (s *Server) collect() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if _, _, err := s.drop(ctx, s.worker.GCPolicy()...); err != nil {
		s.log.Warn("cannot bring the build cache within its budget", "cause", err)
	}
}

// drop removes records and tells which, and what they took.
func (s *Server) drop(ctx context.Context, opts ...client.PruneInfo) (ids []string, size int64, err error) {
	ch := make(chan client.UsageInfo, 32)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for u := range ch {
			ids = append(ids, u.ID)
			size += u.Size
		}
	}()
	err = s.worker.Prune(ctx, ch, opts...)
	close(ch)
	<-done
	return ids, size, err
}

// prune is POST /build/prune.
func (s *Server) prune(w http.ResponseWriter, r *http.Request) {
	o, err := pruneOptions(r)
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	ids, size, err := s.drop(r.Context(), o)
	if err != nil {
		fail(w, http.StatusInternalServerError, err)
		return
	}
	if err := s.writeUsage(r.Context()); err != nil {
		s.log.Warn("cannot write down what the cache takes", "cause", err)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(build.CachePruneReport{CachesDeleted: ids, SpaceReclaimed: uint64(max(size, 0))})
}

// filterKeys are the filters of build prune, besides until.
var filterKeys = map[string]string{"id": "id", "parents": "parents", "type": "type", "description": "description", "inuse": "inuse", "shared": "shared", "private": "private"}

func pruneOptions(r *http.Request) (client.PruneInfo, error) {
	q := r.URL.Query()
	o := client.PruneInfo{All: truth(q.Get("all"))}
	for key, to := range map[string]*int64{"keep-storage": &o.ReservedSpace, "reserved-space": &o.ReservedSpace, "max-used-space": &o.MaxUsedSpace, "min-free-space": &o.MinFreeSpace} {
		v := q.Get(key)
		if v == "" {
			continue
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			if n, err = units.RAMInBytes(v); err != nil {
				return o, fmt.Errorf("%s is in bytes, expected an integer, got %s", key, v)
			}
		}
		*to = n
	}
	filters, err := parseFilters(q.Get("filters"))
	if err != nil {
		return o, err
	}
	for key, values := range filters {
		for _, v := range values {
			switch {
			case key == "until" || key == "unused-for":
				d, err := age(v)
				if err != nil {
					return o, fmt.Errorf("%q filter expects a duration (e.g., '24h') or a timestamp: %w", key, err)
				}
				o.KeepDuration = d
			case filterKeys[key] == "inuse" || filterKeys[key] == "shared" || filterKeys[key] == "private":
				term := key
				if !truth(v) {
					term = key + "==false"
				}
				o.Filter = append(o.Filter, term)
			case filterKeys[key] != "":
				o.Filter = append(o.Filter, filterKeys[key]+"=="+strconv.Quote(v))
			default:
				return o, fmt.Errorf("invalid filter '%s'", key)
			}
		}
	}
	// Terms of one filter all hold.
	if len(o.Filter) > 1 {
		o.Filter = []string{strings.Join(o.Filter, ",")}
	}
	return o, nil
}

// age is how long ago a time was, or the duration itself.
func age(v string) (time.Duration, error) {
	if d, err := time.ParseDuration(v); err == nil {
		return d, nil
	}
	if n, err := strconv.ParseInt(v, 10, 64); err == nil {
		return time.Since(time.Unix(n, 0)), nil
	}
	t, err := time.Parse(time.RFC3339, v)
	return time.Since(t), err
}

// parseFilters reads {"key":["value"]} and the older {"key":{"value":true}}.
func parseFilters(s string) (map[string][]string, error) {
	if s == "" {
		return nil, nil
	}
	var lists map[string][]string
	if json.Unmarshal([]byte(s), &lists) == nil {
		return lists, nil
	}
	var sets map[string]map[string]bool
	if err := json.Unmarshal([]byte(s), &sets); err != nil {
		return nil, fmt.Errorf("invalid filters: %w", err)
	}
	out := map[string][]string{}
	for k, set := range sets {
		for v, on := range set {
			if on {
				out[k] = append(out[k], v)
			}
		}
		slices.Sort(out[k])
	}
	return out, nil
}

func truth(s string) bool {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

// diskUsage is what the cache takes, as Docker's API says it.
func (s *Server) diskUsage(ctx context.Context) (*build.DiskUsage, error) {
	list, err := s.worker.DiskUsage(ctx, client.DiskUsageInfo{})
	if err != nil {
		return nil, fmt.Errorf("cannot measure the build cache: %w", err)
	}
	du := &build.DiskUsage{}
	for _, u := range list {
		du.Items = append(du.Items, build.CacheRecord{
			ID: u.ID, Parents: u.Parents, Type: string(u.RecordType), Description: u.Description, InUse: u.InUse, Shared: u.Shared,
			Size: u.Size, CreatedAt: u.CreatedAt, LastUsedAt: u.LastUsedAt, UsageCount: u.UsageCount,
		})
		du.TotalCount++
		if u.InUse {
			du.ActiveCount++
		}
		if u.Shared {
			continue // an image has it
		}
		du.TotalSize += u.Size
		if !u.InUse {
			du.Reclaimable += u.Size
		}
	}
	return du, nil
}

func (s *Server) usage(w http.ResponseWriter, r *http.Request) {
	du, err := s.diskUsage(r.Context())
	if err != nil {
		fail(w, http.StatusInternalServerError, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(du)
}

// writeUsage leaves what the cache takes to the engine, for when no builder runs.
func (s *Server) writeUsage(ctx context.Context) error {
	du, err := s.diskUsage(ctx)
	if err != nil {
		return err
	}
	b, err := json.Marshal(du)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(s.set.Root, "usage.json"), b, 0o600, durable.Nothing)
}
