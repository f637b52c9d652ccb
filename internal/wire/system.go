package wire

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"

	"github.com/cloudos-io/cloudos/api/system"
)

// operatingSystem passes calls about the system on to the first process of a CloudOS
// machine, which listens before it starts the engine; elsewhere there is none.
func operatingSystem(log *slog.Logger) http.Handler {
	st, err := os.Lstat(system.Socket)
	if err != nil || st.Mode()&os.ModeSocket == 0 {
		return nil
	}
	p := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: "system"}) },
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", system.Socket)
			},
			DisableKeepAlives: true, DisableCompression: true,
		},
		FlushInterval: -1, // lines of progress
		ErrorLog:      slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			log.Warn("cannot reach the first process", "error", err)
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadGateway)
			_, _ = w.Write([]byte(`{"message":"cannot reach the machine's first process"}` + "\n"))
		},
	}
	return p
}
