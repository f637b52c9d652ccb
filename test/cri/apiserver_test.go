package cri

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// apiServer answers a kubelet as Kubernetes' API server does: objects in memory,
// lists, watches, patches and deletions with grace. A real one takes etcd and
// minutes to build; the kubelet does not see the difference.
type apiServer struct {
	url string

	mu      sync.Mutex
	version int
	objects map[string]map[string]any // by path
	watches map[chan event]string     // by path of the collection
}

type event struct {
	Type   string `json:"type"`
	Object any    `json:"object"`
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	ln, err := net.Listen("tcp", nodeIP+":0")
	if err != nil {
		t.Fatal(err)
	}
	a := &apiServer{url: "http://" + ln.Addr().String(), objects: map[string]map[string]any{}, watches: map[chan event]string{}}
	srv := &http.Server{Handler: a}
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close() })
	return a
}

// kubeconfig names the server to a kubelet.
func (a *apiServer) kubeconfig(t *testing.T, dir string) string {
	t.Helper()
	p := filepath.Join(dir, "kubeconfig")
	conf := `{"apiVersion":"v1","kind":"Config","current-context":"c","clusters":[{"name":"c","cluster":{"server":"` + a.url + `"}}],
"users":[{"name":"u","user":{}}],"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}]}`
	if err := os.WriteFile(p, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// put makes or replaces an object below a collection such as
// /api/v1/namespaces/default/pods.
func (a *apiServer) put(collection, object string) {
	var o map[string]any
	if err := json.Unmarshal([]byte(object), &o); err != nil {
		panic(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.store(collection, o)
}

// get is a copy of an object, nil if there is none.
func (a *apiServer) get(path string) map[string]any {
	a.mu.Lock()
	defer a.mu.Unlock()
	return clone(a.objects[path])
}

func clone(o map[string]any) map[string]any {
	if o == nil {
		return nil
	}
	b, _ := json.Marshal(o)
	var c map[string]any
	_ = json.Unmarshal(b, &c)
	return c
}

func meta(o map[string]any) map[string]any {
	m, _ := o["metadata"].(map[string]any)
	if m == nil {
		m = map[string]any{}
		o["metadata"] = m
	}
	return m
}

// store notes an object and tells who watches; the caller holds mu.
func (a *apiServer) store(collection string, o map[string]any) {
	m := meta(o)
	a.version++
	m["resourceVersion"] = strconv.Itoa(a.version)
	path := collection + "/" + fmt.Sprint(m["name"])
	kind := "ADDED"
	if a.objects[path] != nil {
		kind = "MODIFIED"
	} else if m["uid"] == nil {
		m["uid"] = fmt.Sprintf("%08d-0000-4000-8000-000000000000", a.version)
		m["creationTimestamp"] = time.Now().UTC().Format(time.RFC3339)
	}
	a.objects[path] = o
	a.tell(collection, event{kind, clone(o)})
}

func (a *apiServer) tell(collection string, e event) {
	for ch, of := range a.watches {
		if of == resource(collection) {
			select {
			case ch <- e:
			default:
			}
		}
	}
}

// resource is a collection without its namespace: a watch may be of all.
func resource(collection string) string {
	parts := strings.Split(collection, "/")
	for i := range parts {
		if parts[i] == "namespaces" && i+2 < len(parts) {
			return strings.Join(append(append([]string{}, parts[:i]...), parts[i+2:]...), "/")
		}
	}
	return collection
}

// split finds the collection, the name and the subresource in a path.
func split(path string) (collection, name, sub string) {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	at := 2 // api/v1
	if parts[0] == "apis" {
		at = 3
	}
	if len(parts) > at+2 && parts[at] == "namespaces" {
		at += 2
	}
	collection = "/" + strings.Join(parts[:min(at+1, len(parts))], "/")
	if len(parts) > at+1 {
		name = parts[at+1]
	}
	if len(parts) > at+2 {
		sub = parts[at+2]
	}
	return collection, name, sub
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v)
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	collection, name, sub := split(q.URL.Path)
	var body map[string]any
	if b, _ := io.ReadAll(q.Body); len(b) > 0 {
		_ = json.Unmarshal(b, &body)
	}
	if q.Method == http.MethodGet && name == "" {
		if q.URL.Query().Get("watch") != "" {
			a.watch(w, q, collection)
			return
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		answer(w, 200, map[string]any{"kind": "List", "apiVersion": "v1", "metadata": map[string]any{"resourceVersion": strconv.Itoa(a.version)}, "items": a.all(collection, q)})
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	path := collection + "/" + name
	o := a.objects[path]
	missing := map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404, "message": q.URL.Path + " not found"}
	switch {
	case sub == "token":
		answer(w, 201, map[string]any{"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": body["spec"],
			"status": map[string]any{"token": "token-of-" + name, "expirationTimestamp": time.Now().Add(time.Hour).UTC().Format(time.RFC3339)}})
	case q.Method == http.MethodPost:
		a.store(collection, body)
		answer(w, 201, body)
	case o == nil:
		answer(w, 404, missing)
	case q.Method == http.MethodGet:
		answer(w, 200, o)
	case q.Method == http.MethodPut:
		a.store(collection, body)
		answer(w, 200, body)
	case q.Method == http.MethodPatch:
		o = clone(o)
		merge(o, body)
		a.store(collection, o)
		answer(w, 200, o)
	case q.Method == http.MethodDelete:
		if g, ok := body["gracePeriodSeconds"].(float64); ok && g > 0 {
			m := meta(o)
			m["deletionTimestamp"], m["deletionGracePeriodSeconds"] = time.Now().Add(time.Duration(g)*time.Second).UTC().Format(time.RFC3339), g
			a.store(collection, o)
		} else {
			delete(a.objects, path)
			a.version++
			meta(o)["resourceVersion"] = strconv.Itoa(a.version)
			a.tell(collection, event{"DELETED", clone(o)})
		}
		answer(w, 200, o)
	}
}

// merge is a patch as far as a kubelet makes them: lists are replaced.
func merge(into, patch map[string]any) {
	for k, v := range patch {
		if strings.HasPrefix(k, "$") {
			continue
		}
		sub, ok := v.(map[string]any)
		have, had := into[k].(map[string]any)
		switch {
		case v == nil:
			delete(into, k)
		case ok && had:
			merge(have, sub)
		default:
			into[k] = v
		}
	}
}

// all lists a collection; the one field that a kubelet selects by is a node's, and
// a node's own name.
func (a *apiServer) all(collection string, q *http.Request) []any {
	name, byName := strings.CutPrefix(q.URL.Query().Get("fieldSelector"), "metadata.name=")
	out := []any{}
	for path, o := range a.objects {
		c, n, _ := split(path)
		if (c == collection || resource(c) == collection) && (!byName || n == name) {
			out = append(out, clone(o))
		}
	}
	return out
}

func (a *apiServer) watch(w http.ResponseWriter, q *http.Request, collection string) {
	ch := make(chan event, 1000)
	var first []any
	a.mu.Lock()
	if q.URL.Query().Get("sendInitialEvents") == "true" {
		first = a.all(collection, q)
	}
	version := strconv.Itoa(a.version)
	a.watches[ch] = resource(collection)
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		delete(a.watches, ch)
		a.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "application/json")
	enc, fl := json.NewEncoder(w), w.(http.Flusher)
	for _, o := range first {
		_ = enc.Encode(event{"ADDED", o})
	}
	if q.URL.Query().Get("sendInitialEvents") == "true" {
		kind, apiVersion := kindOf(collection)
		_ = enc.Encode(event{"BOOKMARK", map[string]any{"kind": kind, "apiVersion": apiVersion, "metadata": map[string]any{
			"resourceVersion": version, "annotations": map[string]string{"k8s.io/initial-events-end": "true"}}}})
	}
	fl.Flush()
	for {
		select {
		case e := <-ch:
			if enc.Encode(e) != nil {
				return
			}
			fl.Flush()
		case <-q.Context().Done():
			return
		}
	}
}

// kindOf names the objects of a collection.
func kindOf(collection string) (kind, apiVersion string) {
	parts := strings.Split(strings.Trim(resource(collection), "/"), "/")
	apiVersion = strings.Join(parts[1:len(parts)-1], "/")
	kinds := map[string]string{"nodes": "Node", "pods": "Pod", "services": "Service", "runtimeclasses": "RuntimeClass", "csidrivers": "CSIDriver",
		"csinodes": "CSINode", "clustertrustbundles": "ClusterTrustBundle", "resourceslices": "ResourceSlice", "leases": "Lease"}
	return kinds[parts[len(parts)-1]], apiVersion
}
